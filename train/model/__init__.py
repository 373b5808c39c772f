"""The model of a run: projector, prompt and language model."""
