"""Measurements: each module prints its figures, taken side by side in one run."""
