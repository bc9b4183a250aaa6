"""train: train the proxy network on pseudo-labels and record its dynamics."""
