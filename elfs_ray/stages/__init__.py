"""The stages: tables in, tables out, on Ray; a folder each, whose `__init__` says what it is and run.py does it.

Only files pass between them: a stage imports no other's run.py.
"""
