"""From a family's modules to Graphs: their tensors by name, and what layers are written with."""
