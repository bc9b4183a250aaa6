"""Training of image classifiers: networks, SGD, augmentation, dynamics."""
