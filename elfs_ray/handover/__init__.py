"""Hand a coreset over to a labelling tool or a trainer: one module for each format, listed in formats.py."""
