"""Engines over buffers, without Hugging Face: both sides of a model, and what they run in."""
