"""One folder for each operation: `api.py` checks and dispatches, `reference.py` defines, the others are for GPUs."""
