"""A small real model: words to ARPAbet phonemes, learnt from the CMU Pronouncing Dictionary."""
