"""Summary of a job in plain values, which can be sent between machines.

A driver without an encoder learns from a :class:`JobSummary` how much is left to do and what to print.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from pipeline.extract.job import Job, estimate_bytes


@dataclass(frozen=True)
class JobSummary:
    """Summary of a scheduled job.

    Attributes:
        source: name of the source.
        encoder: name of the encoder.
        layers: layer of each target.
        device: device of the encoder.
        dtype: compute dtype of the encoder.
        decode_workers: decoding threads per encoder.
        caches: folder or URL of each target.
        shard_sizes: number of planned utterances of each shard.
        todo: shards that are not committed or must be extracted again.
        estimated_bytes: approximate size of the tars of ``todo``.
        is_complete: nothing is left to do; the caches are final.
        problems: problems found in the source, one sentence each.
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
        """Return one line that describes the work, printed before it starts."""
        return (
            f"{self.utterances} utterances of {self.source} -> {self.encoder} "
            f"layer {', '.join(map(str, self.layers))} on {self.device} in {self.dtype}; "
            f"{len(self.todo)} of {len(self.shard_sizes)} shards to extract, about {self.estimated_bytes / 1e6:.0f} MB"
        )


def summarize(job: Job) -> JobSummary:
    """Return the summary of a scheduled ``job``."""
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
