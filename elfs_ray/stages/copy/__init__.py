"""copy: a small copy of every image, before an encoder is trained on the pool."""
