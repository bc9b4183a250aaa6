"""evaluate: train on the coreset and on random samples with true labels."""
