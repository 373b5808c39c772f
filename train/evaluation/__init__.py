"""Figures on held-out utterances, a kind a module."""
