"""Where the features of a cache are from and what made them: told in ``CACHE.json``, part of no identity.

In: a prepared :class:`pipeline.job.Job`. Out: a tree of plain values.
"""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.job import Job


def provenance(job: Job) -> dict[str, Any]:
    """Where the features are from and what makes them; part of no identity."""
    import torch
    import transformers

    import shards

    return {
        "source": {
            "kind": job.config.source.kind,
            "name": job.source.name,
            "root": str(job.source.root.resolve()) if job.source.root else None,
            "fingerprint": job.fingerprint,
            "problems": job.source.problems,
        },
        "encoder": {
            "name": job.encoder.name,
            "reference": job.weights.reference,
            "revision": job.weights.revision,
            "device": str(job.encoder.device),
            "batch_size": job.config.encoder.batch_size,
        },
        "config": job.config.model_dump(mode="json"),
        "earshard": shards.VERSION,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
    }
