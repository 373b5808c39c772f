"""What is to be told about a job, in plain values that travel between machines.

In: a scheduled :class:`pipeline.extract.job.Job`. Out: :class:`JobSummary`, from which a driver that holds no encoder
knows how much is left to do and what to print.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from pipeline.extract.job import Job, estimate_bytes


@dataclass(frozen=True)
class JobSummary:
    """A job as a driver or a person sees it.

    Attributes:
        caches: the folder or URL of each target.
        sizes: planned utterances of each shard.
        todo: shards that are not committed, or must be made again.
        size: bytes that the tars of ``todo`` will take, about.
        complete: nothing is left to do, the caches are merged.
        problems: what was odd in the source, one sentence each.
    """

    source: str
    encoder: str
    layers: list[int]
    device: str
    dtype: str
    decode_workers: int
    caches: list[str]
    shard_sizes: list[int]
    todo: list[int]
    estimated_bytes: int
    is_complete: bool
    problems: list[str]

    @property
    def utterances(self) -> int:
        return sum(self.shard_sizes)

    def headline(self) -> str:
        """What will be done, before it is."""
        return (
            f"{self.utterances} utterances of {self.source} -> {self.encoder} "
            f"layer {', '.join(map(str, self.layers))} on {self.device} in {self.dtype}; "
            f"{len(self.todo)} of {len(self.shard_sizes)} shards to make, about {self.estimated_bytes / 1e6:.0f} MB"
        )


def summarize(job: Job) -> JobSummary:
    """What there is to tell about a scheduled ``job``."""
    counts = Counter(job.plan.table["shard"].to_pylist())
    return JobSummary(
        source=job.source.name,
        encoder=job.encoder.name,
        layers=[target.layer for target in job.targets],
        device=str(job.encoder.device),
        dtype=job.encoder.dtype,
        decode_workers=job.decode_workers,
        caches=[target.store.location for target in job.targets],
        shard_sizes=[counts[shard] for shard in range(job.plan.num_shards)],
        todo=job.todo,
        estimated_bytes=estimate_bytes(job, job.todo),
        is_complete=job.is_complete(),
        problems=list(job.source.problems),
    )
