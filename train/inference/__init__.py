"""A trained projector in use: ``transcribe``, ``export``."""
