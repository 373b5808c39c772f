"""Whole caches to and from object stores and hubs: ``push``, ``pull``."""
