"""Texts as vectors: the models, where they come from, and the late-interaction form."""
