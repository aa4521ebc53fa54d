"""The kinds of model, each a mixin: which calls an engine serves, and torch for the others."""
