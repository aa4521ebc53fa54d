"""What ties an engine to Hugging Face's classes, and the versions of them that it is right with."""
