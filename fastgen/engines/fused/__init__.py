"""Decoder steps and encoders as a handful of CUDA launches a layer: vocabularies, recorded."""
