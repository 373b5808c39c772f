"""Summary of a job in plain values, which can be sent between machines.

A driver without an encoder learns from a :class:`JobSummary` how much is left to do and what to print.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from pipeline.extract.job import Extraction, Job, estimate_job_bytes
from pipeline.extract.stats import ExtractionStats
from shards.format.variants import are_variants


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
        generation: number of the generation.
        shard_sizes: number of planned utterances by shard.
        todo: shards that are not committed or must be extracted again.
        copied: number of planned utterances that are copied, by the cache that holds them.
        estimated_bytes: approximate size of the tars of ``todo``.
        variants: number of planned variants.
        variant_hours: hours of audio of these.
        variant_bytes: approximate size of these in the tars.
    """

    source: str
    encoder: str
    layers: list[int]
    device: str
    dtype: str
    decode_workers: int
    caches: list[str]
    generation: int
    shard_sizes: dict[int, int]
    todo: list[int]
    copied: dict[str, int]
    estimated_bytes: int
    variants: int = 0
    variant_hours: float = 0.0
    variant_bytes: int = 0

    @property
    def utterances(self) -> int:
        return sum(self.shard_sizes.values())

    def headline(self) -> str:
        """Return one line that describes the work, printed before it starts."""
        noun = "utterance" if self.utterances == 1 else "utterances"
        if self.variants:
            noun = "rows"
        what = noun if self.generation == 0 else f"new {noun} (generation {self.generation})"
        copied = sum(self.copied.values()) // len(self.layers)
        reused = f", {copied} of them copied from {', '.join(sorted(self.copied))}" if copied else ""
        varied = ""
        if self.variants:
            size = f"{self.variant_bytes / 1e9:.1f} GB"
            if self.variant_bytes < 1e9:
                size = f"{self.variant_bytes / 1e6:.1f} MB"
            varied = f"; {self.variants} of the rows are variants ({self.variant_hours:.2f} h, about {size} on disk)"
        return (
            f"{self.utterances} {what} of {self.source} -> {self.encoder} "
            f"layer {', '.join(map(str, self.layers))} on {self.device} in {self.dtype}; "
            f"{len(self.todo)} of {len(self.shard_sizes)} shards to extract, about {self.estimated_bytes / 1e6:.0f} MB"
            f"{reused}{varied}"
        )


def summarize(job: Job) -> JobSummary:
    """Return the summary of a scheduled ``job``."""
    copied: Counter[str] = Counter()
    varied = are_variants(job.plan.columns("key")["key"])
    for reuse in job.reuse:
        copied.update(reuse.sources)
    return JobSummary(
        source=job.source.name,
        encoder=job.encoder.name,
        layers=[target.layer for target in job.targets],
        device=str(job.encoder.device),
        dtype=job.encoder.dtype,
        decode_workers=job.decode_workers,
        caches=[target.store.location for target in job.targets],
        generation=job.generation,
        shard_sizes=job.plan.sizes,
        todo=job.todo,
        copied=dict(copied),
        estimated_bytes=estimate_job_bytes(job, job.todo),
        variants=int(varied.sum()),
        variant_hours=float(job.plan.samples[varied].sum()) / job.encoder.sampling_rate / 3600,
        variant_bytes=estimate_job_bytes(job, job.plan.shards, varied),
    )


@dataclass
class CacheResult:
    """What an extraction did to one cache.

    Attributes:
        cache: folder or URL.
        labels: id of the source's label set.
        label_rows: number of its rows.
        relabelled: whether the source's labels changed.
        generation: the newest generation.
        planned: utterances of the generations that this run worked on.
        encoded, reused, failed: what became of utterances in this run; reused ones are copies from other caches.
    """

    cache: str
    labels: str
    label_rows: int
    relabelled: bool
    generation: int = 0
    planned: int = 0
    encoded: int = 0
    reused: int = 0
    failed: int = 0

    def to_json(self, seconds: float) -> dict[str, Any]:
        """Return the object that ``--json`` writes; ``seconds`` is the duration of the command."""
        names = ("cache", "generation", "labels", "planned", "encoded", "reused", "relabelled", "failed")
        return {**{name: getattr(self, name) for name in names}, "seconds": round(seconds, 3)}


@dataclass
class Outcome:
    """What an extraction did.

    Attributes:
        results: one per cache.
        problems: problems of the source and notes about the caches, one sentence each.
        changed_audio: number of utterances whose audio changed under an unchanged key.
        summary: of the last job; None if there was nothing to extract.
        stats: counts of all jobs.
        copied_from: the caches that features were copied from.
    """

    results: list[CacheResult]
    problems: list[str]
    changed_audio: int = 0
    summary: JobSummary | None = None
    stats: ExtractionStats = field(default_factory=ExtractionStats)
    copied_from: set[str] = field(default_factory=set)

    def add(self, summary: JobSummary, stats: ExtractionStats) -> None:
        """Add a finished job."""
        self.summary = summary
        self.stats.merge(stats)
        self.copied_from |= set(summary.copied)
        for result in self.results:
            if result.cache in summary.caches:
                result.generation = max(result.generation, summary.generation)
                result.planned += summary.utterances
                result.reused += stats.copied
                result.failed += len(stats.failures)
                result.encoded += stats.utterances - stats.copied - len(stats.failures)

    def is_new(self, result: CacheResult) -> bool:
        """Return whether this run extracted the first generation of a cache, whose labels are new, too."""
        return result.planned > 0 and result.generation == 0


def open_outcome(extraction: Extraction) -> Outcome:
    """Return the outcome of an extraction before its first job."""
    results = []
    for target, entry, relabelled in zip(extraction.targets, extraction.entries, extraction.relabelled, strict=True):
        info = target.store.info()
        last = len(info["generations"]) - 1 if info is not None else 0
        results.append(CacheResult(target.store.location, entry.id, entry.rows, relabelled, last))
    return Outcome(results, [*extraction.listing.problems, *extraction.notes])
