"""Extraction jobs: plan, shards, worker processes, progress, summary."""
