"""Services that every stage uses: the Ray cluster, requests to it, progress in the terminal, metrics."""
