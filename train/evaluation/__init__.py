"""Metrics on held-out utterances, one module per kind of metric."""
