"""pretrain: train an encoder on the pool itself, without labels."""
