"""Loops beside requests: leases that end, leftovers, watermarks, configuration, the model list."""
