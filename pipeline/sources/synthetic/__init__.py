"""Synthetic corpora, generated on demand: spoken sentences of a small grammar, and tones."""
