"""Scores, pruning and baselines: which samples a method keeps."""
