"""Projector, prompt and language model together."""
