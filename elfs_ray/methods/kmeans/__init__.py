"""k-means over unit-length embeddings, the same for any number of shards."""
