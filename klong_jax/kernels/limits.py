"""What kernels ask of those who lay out their arguments, who need no JAX for that."""

MOST_SEGMENTS = 128
"""Windows of a row at most: a GPU sets aside room for as many, whatever a row has."""
