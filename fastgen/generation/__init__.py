"""The decoding loops: who chooses the next token, on which path, and why not a faster one."""
