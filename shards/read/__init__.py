"""Committed features as memory-mapped, checked rows."""
