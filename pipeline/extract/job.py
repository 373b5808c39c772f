"""The extraction job: everything that is decided before the first frame is computed.

:func:`prepare_job` turns an :class:`pipeline.config.ExtractConfig` into a :class:`Job`: source, encoder, plan, and the
caches to fill, one per layer. :func:`schedule` reads the commit records once and decides which shards are left to
extract or must be extracted again. :func:`provenance` is what ``CACHE.json`` records about the job.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from pipeline.config import ExtractConfig
from pipeline.encoders.base import Encoder
from pipeline.encoders.load import compile_encoder, load_encoder
from pipeline.extract.plan import corpus_fingerprint, count_frames, count_windows, list_utterances, make_plan
from pipeline.extract.resources import first_device, num_decode_workers
from pipeline.sources import Source, Utterance, open_source
from pipeline.weights.resolve import Weights, resolve_weights
from shards.commit.claims import new_owner
from shards.commit.store import Store, open_store
from shards.errors import UserError
from shards.format.codec import STORED_DTYPE
from shards.format.layout import Layout, Plan
from shards.format.records import RecordError
from shards.format.spec import FeatureSpec
from shards.remote.client import is_url

MAX_PUT_MB = 4000  # MB; S3 accepts 5 GiB in one put, and shard sizes vary slightly
MAX_SCRATCH_SHARDS = 3  # shards on a process's scratch disk: one being written, one being uploaded, one waiting


@dataclass(frozen=True)
class Target:
    """One cache to fill: its layer, its location and its spec."""

    layer: int
    store: Store
    spec: FeatureSpec

    @property
    def layout(self) -> Layout:
        """The local folder into which shards are written."""
        return self.store.layout


@dataclass
class Job:
    """Everything that is decided before the first frame.

    Attributes:
        todo: shards to extract, because a target lacks them or they were invalidated. :func:`schedule` sets this and
            the following attributes.
        invalidated: for each target, the commit records of shards to extract again, by shard.
        earlier_failures: failures in the valid commit records.
        failed_attempts: failed attempts before this run, by utterance key.
    """

    config: ExtractConfig
    source: Source
    encoder: Encoder
    weights: Weights
    targets: list[Target]
    plan: Plan
    fingerprint: str
    owner: str = field(default_factory=new_owner)
    todo: list[int] = field(default_factory=list)
    invalidated: list[dict[int, dict[str, Any]]] = field(default_factory=list)
    earlier_failures: list[dict[str, Any]] = field(default_factory=list)
    failed_attempts: dict[str, int] = field(default_factory=dict)

    def missing_targets(self, shard: int) -> list[Target]:
        """Return the targets that have no valid commit record of ``shard`` at this moment."""
        return [t for t in self.targets if t.store.commit_record(shard, t.spec.feature_id, self.plan.id) is None]

    @property
    def decode_workers(self) -> int:
        """Threads that decode audio for this process's encoder."""
        import torch

        return num_decode_workers(
            self.config.decode_workers,
            device=self.encoder.device,
            cpus=os.cpu_count() or 1,
            gpus=torch.cuda.device_count(),
        )

    def is_complete(self) -> bool:
        return all(t.store.is_complete(t.spec.feature_id, self.plan.id) for t in self.targets)

    @contextmanager
    def hold_leases(self) -> Iterator[None]:
        """Within this context the process may claim shards of all targets."""
        with ExitStack() as stack:
            for target in self.targets:
                stack.enter_context(target.store.hold_leases(self.owner, self.config.lease_seconds))
            yield


def prepare_job(config: ExtractConfig) -> Job:
    """Resolve the weights, load the encoder, list the source and fix the plan.

    Raises:
        UserError: a setting is invalid, or the weights, the source or a cache folder cannot be used with it.
    """
    if is_url(config.root) and config.shard_mb > MAX_PUT_MB:
        raise UserError(
            f"shard_mb={config.shard_mb:g} exceeds the largest object that can be uploaded at once: set it to "
            f"{MAX_PUT_MB} or less"
        )
    weights, encoder = load_configured_encoder(config, first_device(config))
    if config.trim == "none" and encoder.window != "full30":
        raise UserError(
            f"trim=none stores padded windows, but window={encoder.window} does not pad to a fixed size: use trim=valid"
        )
    if config.overlap * encoder.sampling_rate >= encoder.window_samples:
        raise UserError(f"overlap={config.overlap} is not shorter than the encoder's window: set a smaller overlap")
    layers = resolve_layers(config.encoder.layers, encoder.n_layers)
    limits = [n for n in (config.limit, config.source.limit) if n is not None]
    source = open_source(config.source.model_copy(update={"limit": min(limits, default=None)}))
    utterances = list_utterances(source)
    fingerprint = corpus_fingerprint(utterances, source.version)
    corpus = f"{config.root.rstrip('/') or '/'}/{source.name}-{fingerprint[:8]}"
    targets = []
    for layer in layers:
        spec = feature_spec(config, encoder, layer)
        tight = "-tight" if spec.window == "tight" else ""
        folder = f"{corpus}/{encoder.name}-L{layer}{tight}-{spec.codec}-{spec.feature_id[:8]}"
        targets.append(Target(layer, open_store(folder, config.scratch), spec))
    plan = _load_or_make_plan(config, encoder, source, utterances, targets, fingerprint)
    job = Job(config, source, encoder, weights, targets, plan, fingerprint)
    compile_encoder(encoder, config.encoder.compile, count_windows(plan.table, encoder, config.overlap))
    return job


def load_configured_encoder(config: ExtractConfig, device: str) -> tuple[Weights, Encoder]:
    """Load the encoder of ``config`` on ``device``; return its weights and the encoder. Raises UserError."""
    weights = resolve_weights(config.encoder.model, role="encoder")
    encoder = load_encoder(
        weights,
        device=device,
        dtype=config.encoder.dtype,
        batch_size=config.encoder.batch_size,
        window=config.window,
        margin=config.margin if config.window == "tight" else 0.0,
    )
    return weights, encoder


def resolve_layers(layers: list[int] | None, n_layers: int) -> list[int]:
    """Return the configured layers as unique, sorted numbers from 0 to ``n_layers``; None selects the last layer.

    Raises:
        UserError: the list is empty, or the encoder lacks a layer.
    """
    chosen = set()
    for layer in layers if layers is not None else [n_layers]:
        if not -n_layers - 1 <= layer <= n_layers:
            raise UserError(f"encoder.layers contains {layer}, but this encoder has layers 0 to {n_layers}")
        chosen.add(layer if layer >= 0 else n_layers + 1 + layer)
    if not chosen:
        raise UserError("encoder.layers is empty: name at least one layer, or omit the key for the last layer")
    return sorted(chosen)


def feature_spec(config: ExtractConfig, encoder: Encoder, layer: int) -> FeatureSpec:
    """Return the spec, i.e. the identity, of the features that this configuration produces at ``layer``."""
    return FeatureSpec(
        family=encoder.family,
        tensors=encoder.tensors,
        frontend=encoder.frontend,
        layer=layer,
        channels=encoder.channels,
        hop=encoder.hop,
        sampling_rate=encoder.sampling_rate,
        window=encoder.window,
        margin=encoder.margin,
        overlap=config.overlap,
        trim=config.trim,
        dtype=encoder.dtype,  # type: ignore[arg-type]
        codec=config.codec,
    )


def _load_or_make_plan(
    config: ExtractConfig,
    encoder: Encoder,
    source: Source,
    utterances: Sequence[Utterance],
    targets: list[Target],
    fingerprint: str,
) -> Plan:
    """Return the plan that all targets share: an existing one if there is one, else a new one. Write it to all."""
    for target in targets:
        _check_same_spec(target)
    padded = encoder.window_samples // encoder.hop if config.trim == "none" else None
    existing = [target.store.plan() for target in targets]
    table = next((plan.table for plan in existing if plan is not None), None)
    if table is None:
        table = make_plan(
            utterances,
            shuffle=not source.sequential,
            seed=config.source.seed,
            frame_bytes=encoder.channels * STORED_DTYPE[config.codec].itemsize,
            hop=encoder.hop,
            padded_frames=padded,
            shard_mb=config.shard_mb,
        )
    plans = [plan or target.store.write_plan(table) for target, plan in zip(targets, existing, strict=True)]
    for target, plan in zip(targets, plans, strict=True):
        if plan.id != plans[0].id:
            raise UserError(
                f"'{target.store.location}' and '{targets[0].store.location}' have different plans: extract these "
                "layers separately"
            )
        planned = plan.table.select(_PLAN_COLUMNS).to_pylist()
        found = corpus_fingerprint((Utterance(**row) for row in planned), source.version)
        if found != fingerprint:
            raise UserError(
                f"the plan in '{target.store.location}' belongs to another corpus (expected {fingerprint[:8]}, got "
                f"{found[:8]}): move the folder away"
            )
    return plans[0]


_PLAN_COLUMNS = ["key", "id", "audio", "samples", "text", "speaker", "split"]


def _check_same_spec(target: Target) -> None:
    try:
        info = target.store.info()
    except RecordError as error:
        raise UserError(
            f"'{target.store.location}/CACHE.json' is corrupt ({error}): delete that file and rerun the extraction; "
            "shards are kept"
        ) from None
    if info is None:
        return
    found = FeatureSpec.parse(info.get("spec"), f"'{target.store.location}/CACHE.json'")
    if found.feature_id != target.spec.feature_id:
        raise UserError(
            f"'{target.store.location}' holds features with another spec "
            f"({'; '.join(found.differences(target.spec))}): choose another root or move the folder away"
        )


def estimate_bytes(job: Job, shards: Sequence[int]) -> int:
    """Estimate the bytes that the tars of ``shards`` will take in all targets together."""
    padded = job.encoder.window_samples // job.encoder.hop if job.config.trim == "none" else None
    wanted = set(shards)
    total = 0
    itemsize = STORED_DTYPE[job.config.codec].itemsize
    for shard, samples in zip(job.plan.table["shard"].to_pylist(), job.plan.table["samples"].to_pylist(), strict=True):
        if shard in wanted:
            total += count_frames(samples, job.encoder.hop, padded) * job.encoder.channels * itemsize + 2600
    return total * len(job.targets)


def schedule(job: Job, *, verify: bool = False, retry_failed: bool = False, shards: Collection[int] = ()) -> None:
    """Find the shards that are left to extract, in one scan of the commit records; complete caches are not scanned.

    A cache with an invalidated shard is no longer complete, so its ``CACHE.json`` is removed first. Failed utterances
    keep their number of attempts.

    Args:
        job: its ``todo``, ``invalidated``, ``earlier_failures`` and ``failed_attempts`` are set.
        verify: re-hash the committed shards and extract corrupt ones again.
        retry_failed: extract shards with failed utterances again.
        shards: shards to extract again in any case.

    Raises:
        UserError: the disk is too small for the remaining shards.
    """
    redo = set(shards)
    if job.is_complete() and not (redo or verify or retry_failed):
        return
    found: list[dict[int, dict[str, Any]]] = []
    for target in job.targets:
        found.append({})
        for shard in range(job.plan.num_shards):
            record = target.store.commit_record(shard, target.spec.feature_id, job.plan.id)
            if record is None:
                continue
            found[-1][shard] = record
            if (retry_failed and record["failures"]) or (verify and target.store.is_corrupt(shard, record)):
                redo.add(shard)
    job.invalidated = [{shard: records[shard] for shard in sorted(redo & records.keys())} for records in found]
    for target, records in zip(job.targets, job.invalidated if redo else (), strict=False):
        target.store.reopen(records)
    for shard, record in found[0].items():
        if shard in redo:
            job.failed_attempts.update({failure["key"]: failure["attempt"] for failure in record["failures"]})
        else:
            job.earlier_failures += record["failures"]
    job.todo = [s for s in range(job.plan.num_shards) if s in redo or any(s not in records for records in found)]
    _check_disk_space(job)


def _check_disk_space(job: Job) -> None:
    folder, keeps_shards = job.targets[0].layout.path, job.targets[0].store.keeps_shards
    # shards are about equal in size
    need = estimate_bytes(job, job.todo if keeps_shards else job.todo[:MAX_SCRATCH_SHARDS])
    free = shutil.disk_usage(folder).free
    if need > free:
        fix = "choose another root, set limit" if keeps_shards else "set scratch, lower shard_mb"
        raise UserError(
            f"the features need about {need / 1e9:.1f} GB, but '{folder}' has {free / 1e9:.1f} GB free: {fix}, or use "
            "codec=int8 for half the size"
        )


def provenance(job: Job) -> dict[str, Any]:
    """Return where the features come from and what computes them; not part of any id."""
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
