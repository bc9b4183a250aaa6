"""Arithmetic that the methods share: exact sums, hashes, PCA, precision."""
