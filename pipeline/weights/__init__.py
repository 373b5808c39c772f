"""Resolve a model reference to a local, checked folder of weights."""
