"""SimCLR: views, loss, training of an encoder without labels."""
