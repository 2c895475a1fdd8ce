"""Definitions of metrics for `evaluate` that need no network: `evaluate.load` would fetch a script from the hub."""
