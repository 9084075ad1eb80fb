"""One kind of block, one place: how it is recognised, what its options are, how it is run."""
