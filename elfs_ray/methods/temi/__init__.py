"""TEMI deep clustering: heads, loss, training."""
