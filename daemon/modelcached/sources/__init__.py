"""Where bytes of a digest may come from, and what a repository holds. Sources never know the cache."""
