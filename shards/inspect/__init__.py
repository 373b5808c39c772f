"""Inspection of caches: ``info`` and ``verify``."""
