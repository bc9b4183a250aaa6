"""Files of a run, on disk or in a bucket: columns and file names, the run directory and its lock. No ray, no config."""
