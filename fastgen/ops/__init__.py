"""The vocabulary that families are written in, and how each Target lowers it."""
