"""Metrics and logs: they observe, nothing depends on them."""
