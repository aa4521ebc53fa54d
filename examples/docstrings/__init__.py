"""A tiny real GPT-2: docstrings byte by byte, learnt from those of Python's standard library."""
