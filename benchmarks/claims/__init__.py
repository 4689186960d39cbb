"""What the papers claim, measured: see ``python -m benchmarks.claims --help``."""
