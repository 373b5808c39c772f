"""Existing caches against the encoder and the audio: ``check``, ``repair``."""
