"""Helpers that several benchmarks share: the form of a result, timing in turns, tracks of trainings."""
