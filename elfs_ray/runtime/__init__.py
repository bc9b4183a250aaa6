"""What every stage needs of Ray and of the terminal: the cluster, progress, metrics."""
