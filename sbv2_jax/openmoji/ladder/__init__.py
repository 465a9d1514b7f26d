"""The ladder: the rungs of the paper's tables 5 to 7 on this world, trained, measured and written down."""
