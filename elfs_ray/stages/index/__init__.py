"""index: list the pool and give every image an id."""
