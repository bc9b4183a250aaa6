"""cluster: pseudo-labels from embeddings."""
