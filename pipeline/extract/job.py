"""The extraction job: everything that is decided before the first frame is computed.

:func:`prepare` turns an :class:`pipeline.config.ExtractConfig` into an :class:`Extraction`: the listed source with its
audio ids, the encoder (not loaded yet if it is known), and the caches to fill, one per layer. :meth:`Extraction.jobs`
returns the work that is left: a :class:`Job` is one generation of the caches that share its plan. The labels of the
source are written before the first job.

```
source -> listing -> audio ids --compare with what the caches hold--> new utterances -> plan -> Job
          listing -> label set "source"
```
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.config import ExtractConfig
from pipeline.encoders.base import Encoder
from pipeline.encoders.lazy import LazyEncoder, open_encoder_lazily
from pipeline.encoders.load import compile_encoder, describe_gpu, fit_batch, load_encoder, use_device
from pipeline.extract.audio_ids import AudioIndex, find_audio_ids
from pipeline.extract.audio_ids import record as record_audio_ids
from pipeline.extract.listing import Listing, list_source
from pipeline.extract.plan import at_rate, count_windows, estimate_bytes, find_new, make_plan
from pipeline.extract.resources import count_gpus, first_device, num_decode_workers
from pipeline.extract.reuse import Donor, Reuse, find_donors, open_extra
from pipeline.extract.targets import LABEL_COLUMNS, LabelLookup, Target, failed_attempts, held_keys, planned_audio
from pipeline.extract.variants import add_variants, beyond, require_same_recipe
from pipeline.sources import Source, open_source
from pipeline.weights.resolve import CODECS, Weights, is_own, resolve_weights
from shards.commit.claims import new_owner
from shards.commit.store import open_store
from shards.errors import UserError
from shards.format.codec import CODES, STORED_DTYPE
from shards.format.layout import Plan
from shards.format.spec import FeatureSpec
from shards.format.variants import are_variants
from shards.labels.store import SOURCE, LabelEntry
from shards.remote.client import is_url

MAX_PUT_MB = 4000  # MB; S3 accepts 5 GiB in one put, and shard sizes vary slightly
MAX_SCRATCH_SHARDS = 3  # shards on a process's scratch disk: one being written, one being uploaded, one waiting
STATE_FOLDER = ".earshard"  # below the root: what earlier extractions learnt about audio files and encoders


@dataclass
class Job:
    """One generation to extract, in the caches that share its plan.

    Attributes:
        generation: number of the generation.
        reuse: for each target, the rows to copy from other caches.
        labels: texts for the ``.json`` members.
        todo: shards to extract, because a target lacks them or they were invalidated. :func:`schedule` sets this and
            the following attributes.
        invalidated: for each target, the commit records of shards to extract again, by shard.
        earlier_failures: failures in the valid commit records.
        failed_attempts: failed attempts before this run, by utterance key.
    """

    config: ExtractConfig
    source: Source
    encoder: LazyEncoder
    weights: Weights
    targets: list[Target]
    generation: int
    plan: Plan
    reuse: list[Reuse]
    labels: LabelLookup
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
        device = self.encoder.device
        gpus = count_gpus() if device.startswith("cuda") else 0
        return num_decode_workers(self.config.decode_workers, device=device, cpus=os.cpu_count() or 1, gpus=gpus)

    def load_encoder(self) -> None:
        """Load the encoder, unless every utterance of the shards to extract is copied; compile it if that pays off."""
        encoded = self.to_encode() & np.isin(self.plan.shard, self.todo)
        if encoded.any():
            windows = count_windows(self.plan.samples[encoded], self.encoder, self.config.overlap)
            encoder = self.encoder.load()
            fit_batch(encoder, len(self.targets))
            compile_encoder(encoder, self.config.encoder.compile, windows)

    def to_encode(self) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Return which planned utterances are encoded, bool [utterances]: those that a target cannot copy."""
        copied: np.ndarray[Any, np.dtype[np.bool_]] = np.all([reuse.copied for reuse in self.reuse], axis=0)
        return ~copied

    def is_complete(self) -> bool:
        return all(t.store.lists_plan(t.spec.feature_id, self.plan.id) for t in self.targets)

    @contextmanager
    def hold_leases(self) -> Iterator[None]:
        """Within this context the process may claim shards of all targets."""
        with ExitStack() as stack:
            for target in self.targets:
                stack.enter_context(target.store.hold_leases(self.owner, self.config.lease_seconds))
            yield


@dataclass
class Extraction:
    """A configuration whose source is listed and whose caches are known.

    Attributes:
        listing: all utterances of the source.
        rows: the rows to plan: these utterances and their variants.
        audio_ids: 32 bytes for each row; zeros where the audio is not known.
        index: the stat cache of audio ids.
        extra: the spec of each cache that ``reuse`` names.
        entries: the entry of the source's label set in each target.
        relabelled: for each target, whether this run wrote a new label set.
        changed_audio: number of utterances whose audio changed under an unchanged key.
        notes: what the user should know about the caches, a sentence each.
    """

    config: ExtractConfig
    source: Source
    encoder: LazyEncoder
    weights: Weights
    targets: list[Target]
    listing: Listing
    rows: pa.Table
    audio_ids: pa.FixedSizeBinaryArray
    index: AudioIndex
    extra: dict[str, FeatureSpec]
    entries: list[LabelEntry] = field(default_factory=list)
    relabelled: list[bool] = field(default_factory=list)
    changed_audio: int = 0
    notes: list[str] = field(default_factory=list)

    def learn_audio_ids(self, job: Job) -> None:
        """Add the ids of recordings that were hashed while they were encoded to the stat cache."""
        if not self.source.hash_ahead:
            table = pq.read_table(job.targets[0].store.tables(job.generation)[0], columns=["key", "audio", "audio_id"])
            table = table.filter(pa.array(~are_variants(table["key"])))
            record_audio_ids(self.source, self.listing, self.index, table["audio"], table["audio_id"])

    def jobs(
        self, *, verify: bool = False, retry_failed: bool = False, shards: Collection[int] = (), grow: bool = True
    ) -> list[Job]:
        """Return the generations that are left to extract: unfinished ones, else one of everything new.

        Call it again when these jobs are finished, until it returns nothing: another process may have added a
        generation meanwhile.

        Args:
            verify: also return the finished generations that have a corrupt shard. Re-hashes every committed shard.
            retry_failed: plan the utterances again that failed.
            shards: shards of finished generations to extract again in any case.
            grow: whether to plan what is new.

        Raises:
            UserError: a plan is corrupt, a cache cannot be written, or the disk is too small.
        """
        plans: dict[tuple[int, str], tuple[Plan, list[Target]]] = {}
        for target in self.targets:
            for generation, plan in self._plans(target, verify or bool(shards), retry_failed, grow):
                plans.setdefault((generation, plan.id), (plan, []))[1].append(target)
        jobs = []
        for (generation, _), (plan, targets) in sorted(plans.items(), key=lambda item: item[0]):
            reuse = [
                Reuse(t.spec, plan, find_donors(self.config.root, t.spec, self.extra, _earlier(t, generation)))
                for t in targets
            ]
            labels = LabelLookup(targets[0].store)
            job = Job(self.config, self.source, self.encoder, self.weights, targets, generation, plan, reuse, labels)
            schedule(job, verify=verify, shards=shards)
            jobs.append(job)
        # A cache with an invalidated shard is open again: its other generations are to be listed again, in order.
        return [job for job in jobs if job.todo or not job.is_complete()]

    def _plans(self, target: Target, finished: bool, retry_failed: bool, grow: bool) -> Iterator[tuple[int, Plan]]:
        """Yield the plans of a target to work on; writes a plan of what is new unless a generation is unfinished."""
        info = target.store.info()
        generations = info["generations"] if info is not None else []
        for number in range(len(generations) if finished else 0):
            plan = target.store.plan(number)
            if plan is None:
                raise UserError(
                    f"'{target.store.location}' lacks the plan of generation {number}: pull or copy it again"
                )
            yield number, plan
        pending = target.store.plan(len(generations))
        if pending is not None:
            self._check_pending(target, pending)
            yield len(generations), pending
            return
        if not grow:
            return
        planned = planned_audio(target, len(generations))
        new, changed = find_new(self.rows["key"], self.audio_ids, planned, self.config.augment.variants)
        self.changed_audio = max(self.changed_audio, changed)
        if retry_failed:
            failed = pa.array(sorted(failed_attempts(target, len(generations))), pa.string())
            new |= pc.is_in(self.rows["key"], value_set=failed).to_numpy()
        if new.any():
            tables = self.make_plan(np.flatnonzero(new), sum(entry["shards"] for entry in generations))
            yield len(generations), target.store.write_plan(len(generations), tables)

    def make_plan(self, chosen: np.ndarray[Any, np.dtype[np.int64]], first_shard: int) -> Iterator[pa.Table]:
        """Yield the plan of these rows, in parts."""
        return make_plan(
            self.rows,
            chosen,
            self.audio_ids,
            shuffle=not self.source.sequential,
            seed=self.config.source.seed,
            frame_bytes=self.encoder.channels * STORED_DTYPE[self.config.codec].itemsize,
            hop=self.encoder.hop,
            padded_frames=padded_frames(self.config, self.encoder),
            shard_mb=self.config.shard_mb,
            first_shard=first_shard,
            variants=self.config.augment.variants,
        )

    def _check_pending(self, target: Target, plan: Plan) -> None:
        """Check that this source has the audio that an unfinished generation was planned from."""
        bases = slice(None, None, self.config.augment.variants)
        known = pa.table({"key": self.listing.table["key"], "audio_id": self.audio_ids[bases]})
        path = f"{target.store.location}/plans/{plan.path.name}"
        require_same_recipe(plan.columns("key", "audio_id"), known, self.config.augment, path)
        audio = plan.columns("audio")["audio"]
        listed = pc.is_in(audio, value_set=self.listing.table["audio"].combine_chunks())
        others = audio.filter(pc.invert(listed)).to_pylist()  # another limit or filter may have planned them
        lost = sum(not token for token in self.source.tokens(others))
        allowed = self.config.max_failures
        if lost > (allowed * len(plan) if allowed < 1 else allowed):
            raise UserError(
                f"'{target.store.location}' has an unfinished generation of {len(plan)} utterances, and this source "
                f"does not have {lost} of them: finish it with the configuration that began it, or delete "
                f"'{target.store.location}/plans/{plan.path.name}' to abandon it"
            )


def _earlier(target: Target, generation: int) -> Donor | None:
    """Return the generations of a cache before ``generation``, to copy from; None if the cache is being repaired."""
    if generation == 0 or target.store.info() is None:
        return None
    return Donor(target.store.location, generation - 1)


def state_folder(root: str) -> Path:
    """Return the folder of what earlier extractions into ``root`` learnt: in it, or for a URL in the user's cache."""
    if not is_url(root):
        return Path(root) / STATE_FOLDER
    import hashlib

    home = Path(os.environ.get("EARSHARD_HOME") or "~/.cache/earshard").expanduser()
    return home / "state" / hashlib.sha256(root.rstrip("/").encode()).hexdigest()[:16]


def prepare(config: ExtractConfig, *, rehash: bool = False, relabel: bool = True, damaged: bool = False) -> Extraction:
    """Resolve the weights, list the source, identify its audio, and write its labels.

    Args:
        rehash: read every audio file, even if its size and modification time are those of an earlier run.
        relabel: whether to write the labels of the source.
        damaged: the caches are to be repaired: what they hold is not read, and all audio is identified.

    Raises:
        UserError: a setting is invalid, or the weights, the source or a cache folder cannot be used with it.
    """
    if is_url(config.root) and config.shard_mb > MAX_PUT_MB:
        raise UserError(
            f"shard_mb={config.shard_mb:g} exceeds the largest object that can be uploaded at once: set it to "
            f"{MAX_PUT_MB} or less"
        )
    weights, encoder = open_configured_encoder(config)
    if config.trim == "none" and encoder.window != "full30":
        raise UserError(
            f"trim=none stores padded windows, but window={encoder.window} does not pad to a fixed size: use trim=valid"
        )
    if config.overlap * encoder.sampling_rate >= encoder.window_samples:
        raise UserError(f"overlap={config.overlap} is not shorter than the encoder's window: set a smaller overlap")
    require_codec(config, encoder)
    layers = resolve_layers(config.encoder.layers, encoder.n_layers)
    limits = [n for n in (config.limit, config.source.limit) if n is not None]
    source = open_source(config.source.model_copy(update={"limit": min(limits, default=None)}))
    specs = [feature_spec(config, encoder, layer) for layer in layers]
    extra = open_extra(config.reuse, specs)
    state = state_folder(config.root)
    spool_folder = state if _is_writable(state) else Path(tempfile.gettempdir())
    listing = list_source(source, spool_folder)
    corpus = f"{config.root.rstrip('/') or '/'}/{source.name}"
    targets = []
    for layer, spec in zip(layers, specs, strict=True):
        tight = "-tight" if spec.window == "tight" else ""
        folder = f"{corpus}/{encoder.name}-L{layer}{tight}-{spec.codec}-{spec.feature_id[:8]}"
        targets.append(Target(layer, open_store(folder, config.scratch), spec))
    known, notes = np.full(len(listing.table), damaged), list[str]()
    for target in () if damaged else targets:
        keys = held_keys(target, config, source, listing)
        if keys is not None:
            known |= pc.is_in(listing.table["key"], value_set=keys).to_numpy()
            if others := beyond(keys, config.augment.variants):
                notes.append(
                    f"'{target.store.location}' also has {others:,} variants that augment no longer makes: set "
                    f"variants={config.augment.variants} in training to leave them out"
                )
    index = AudioIndex(state / f"{source.name}.parquet")
    known |= config.augment.variants > 1  # the audio id of a variant determines its length
    ids = find_audio_ids(source, listing, index, rehash=rehash, hash_unknown=known)
    rows, ids = add_variants(
        at_rate(listing.table, encoder.sampling_rate), ids, config.augment, config.codec, spool_folder
    )
    extraction = Extraction(config, source, encoder, weights, targets, listing, rows, ids, index, extra, notes=notes)
    if not relabel:
        return extraction
    table = listing.table.select(["key", *LABEL_COLUMNS])
    origin = str(config.source.path or config.source.kind)
    for target in targets:
        before = target.store.labels().current(SOURCE)
        entry = target.store.add_labels(table, SOURCE, origin)
        extraction.entries.append(entry)
        extraction.relabelled.append(before is None or before.id != entry.id)
    return extraction


def _is_writable(folder: Path) -> bool:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return os.access(folder, os.W_OK)


def open_configured_encoder(config: ExtractConfig, device: str | None = None) -> tuple[Weights, LazyEncoder]:
    """Resolve the weights of ``config`` and open its encoder, which is loaded when it is used; raises UserError.

    Args:
        device: the device of this process; None is the first one that ``config`` allows.
    """
    weights = resolve_weights(config.encoder.model, role="encoder", typed=True)
    margin = config.margin if config.window == "tight" else 0.0

    def load() -> Encoder:
        return load_encoder(
            weights,
            device=use_device(device or first_device(config)),
            dtype=config.encoder.dtype,
            batch_size=config.encoder.batch_size,
            window=config.window,
            margin=margin,
            codebooks=config.encoder.codebooks,
        )

    return weights, open_encoder_lazily(
        load,
        weights,
        device=device or config.encoder.device,
        dtype=config.encoder.dtype,
        window=config.window,
        margin=margin,
        memo=None if is_own(weights.reference) else state_folder(config.root) / "encoders",
        codebooks=config.encoder.codebooks,
    )


def require_codec(config: ExtractConfig, encoder: Encoder) -> None:
    """Raise UserError unless ``config.codec`` stores what ``encoder`` makes: floats, or the codes of a codec."""
    if (encoder.family in CODECS) != (config.codec == CODES):
        makes, fix = ("integer codes", CODES) if encoder.family in CODECS else ("floats", "f16")
        raise UserError(f"codec={config.codec} does not store what {encoder.name} makes, {makes}: set codec={fix}")


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


def padded_frames(config: ExtractConfig, encoder: Encoder) -> int | None:
    """Return the frames of an untrimmed window; None when frames are trimmed to the audio."""
    return encoder.window_samples // encoder.hop if config.trim == "none" else None


def estimate_job_bytes(
    job: Job, shards: Collection[int], rows: np.ndarray[Any, np.dtype[np.bool_]] | bool = True
) -> int:
    """Estimate the bytes that ``rows`` (bool [planned]) of ``shards`` will take in the tars of all targets together."""
    wanted = np.isin(job.plan.shard, list(shards)) & rows
    frame_bytes = job.encoder.channels * STORED_DTYPE[job.config.codec].itemsize
    padded = padded_frames(job.config, job.encoder)
    sizes = estimate_bytes(job.plan.samples[wanted], job.encoder.hop, padded, frame_bytes)
    return int(sizes.sum()) * len(job.targets)


def schedule(job: Job, *, verify: bool = False, shards: Collection[int] = ()) -> None:
    """Find the shards that are left to extract, in one scan of the commit records; complete caches are not scanned.

    A cache with an invalidated shard is no longer complete, so its ``CACHE.json`` is removed first. Failed utterances
    keep their number of attempts.

    Args:
        job: its ``todo``, ``invalidated``, ``earlier_failures`` and ``failed_attempts`` are set.
        verify: re-hash the committed shards and extract corrupt ones again.
        shards: shards to extract again in any case; others than those of this generation are ignored.

    Raises:
        UserError: the disk is too small for the remaining shards.
    """
    redo = set(shards) & set(job.plan.shards)
    if job.is_complete() and not (redo or verify):
        return
    found: list[dict[int, dict[str, Any]]] = []
    for target in job.targets:
        found.append({})
        for shard in job.plan.shards:
            record = target.store.commit_record(shard, target.spec.feature_id, job.plan.id)
            if record is None:
                continue
            found[-1][shard] = record
            if verify and target.store.is_corrupt(shard, record):
                redo.add(shard)
    job.invalidated = [{shard: records[shard] for shard in sorted(redo & records.keys())} for records in found]
    for target, records in zip(job.targets, job.invalidated if redo else (), strict=False):
        target.store.reopen(records)
    for target in job.targets:
        job.failed_attempts |= failed_attempts(target, job.generation if target.store.info() is not None else 0)
    for shard, record in found[0].items():
        if shard in redo:
            job.failed_attempts.update({failure["key"]: failure["attempt"] - 1 for failure in record["failures"]})
        else:
            job.earlier_failures += record["failures"]
    job.todo = [s for s in job.plan.shards if s in redo or any(s not in records for records in found)]
    _check_disk_space(job)


def _check_disk_space(job: Job) -> None:
    folder, keeps_shards = job.targets[0].layout.path, job.targets[0].store.keeps_shards
    # shards are about equal in size
    need = estimate_job_bytes(job, job.todo if keeps_shards else job.todo[:MAX_SCRATCH_SHARDS])
    free = shutil.disk_usage(folder).free
    if need > free:
        fix = "choose another root, set limit" if keeps_shards else "set scratch, lower shard_mb"
        raise UserError(
            f"the features need about {need / 1e9:.1f} GB, but '{folder}' has {free / 1e9:.1f} GB free: {fix}, or use "
            "codec=int8 for half the size"
        )


def _batches_and_card(job: Job) -> dict[str, Any]:
    """Return the batch size as configured; on a GPU the one in use, and the card, on which the last bits depend."""
    if not (job.encoder.loaded and job.encoder.device.startswith("cuda")):
        return {"batch_size": job.config.encoder.batch_size}
    return {"batch_size": job.encoder.batch_size, "gpu": describe_gpu(job.encoder.device)}


def provenance(job: Job) -> dict[str, Any]:
    """Return where the features come from and what computes them; not part of any id."""
    from importlib import metadata

    import shards

    config = job.config.model_dump(mode="json")
    if job.config.augment.variants == 1:
        del config["augment"]
    return {
        "source": {
            "kind": job.config.source.kind,
            "name": job.source.name,
            "root": str(job.source.root.resolve()) if job.source.root else None,
            "problems": job.source.problems,
        },
        "encoder": {
            "name": job.encoder.name,
            "reference": job.weights.reference,
            "revision": job.weights.revision,
            "device": str(job.encoder.device),
            **_batches_and_card(job),
        },
        "copied": {location: count for reuse in job.reuse for location, count in reuse.sources.items()},
        "config": config,
        "earshard": shards.VERSION,
        "torch": metadata.version("torch"),
        "transformers": metadata.version("transformers"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
    }
