"""Coresets of finished runs beside their rivals: selections, trainings from scratch, tables (jobs/evaluate.py)."""
