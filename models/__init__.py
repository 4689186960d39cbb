"""The networks, and the model as one vector."""
