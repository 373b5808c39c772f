"""Use of a trained projector: ``transcribe`` and ``export``."""
