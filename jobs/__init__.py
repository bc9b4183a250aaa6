"""Entry points for `python jobs/<name>.py` and `ray job submit`, each over the YAML beside it."""
