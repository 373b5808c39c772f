"""Hugging Face language models."""
