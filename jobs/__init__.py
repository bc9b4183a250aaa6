"""Entry points for `ray job submit`: photos.py is `elfs-ray select`, the others name other presets or commands."""
