"""A decoder step as a handful of CUDA launches a layer: the vocabulary, recorded."""
