"""embed: a unit-length vector for every image, and a small copy for the proxy network."""
