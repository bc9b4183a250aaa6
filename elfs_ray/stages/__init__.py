"""The stages of the pipeline: each reads tables, works on Ray, and writes tables.

A stage is a folder: its `__init__` describes the stage and its run.py does the work. Only files pass between stages, so
no stage imports another's run.py.
"""
