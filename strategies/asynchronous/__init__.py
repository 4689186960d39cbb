"""Server rules for sites that answer whenever they are done: what one arrival does to the model."""
