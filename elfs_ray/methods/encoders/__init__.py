"""Pretrained encoders: networks, weights, embeddings."""
