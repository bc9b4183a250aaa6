"""k-means over unit-length embeddings, with the same result for any number of shards."""
