"""What is on disk: columns and file names, the run directory, pools and images. No ray, no config."""
