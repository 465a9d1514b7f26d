"""Pre-training of a whole text-to-image pipeline on the OpenMoji world, with this package's own networks."""
