"""Transfer of whole caches to and from object stores and hubs: ``push`` and ``pull``."""
