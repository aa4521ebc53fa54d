"""One file per Hugging Face ``model_type``: its graph modules and its Fast classes."""
