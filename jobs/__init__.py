"""Entry points for `python jobs/<name>.py` and `ray job submit`, each with its settings in a YAML file of its name."""
