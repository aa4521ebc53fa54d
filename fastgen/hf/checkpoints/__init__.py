"""How libraries hold a Linear in fewer bits, as transformers loads it; none of them is imported."""
