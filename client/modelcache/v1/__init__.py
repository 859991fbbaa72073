"""Generated from proto/modelcache/v1 by `make proto`."""
