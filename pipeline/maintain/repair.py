"""Re-extract exactly the shards that fail verification.

    python -m pipeline repair CACHE

Reads every byte of the cache (``shards/inspect/verify.py``), extracts shards with a problem again from the recorded
source with the recorded settings, and rewrites all merged files. Nothing is removed unless the source has the audio
that the features were made from.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import ExtractConfig
from pipeline.extract.job import Extraction, prepare
from pipeline.extract.local import run_local
from pipeline.extract.plan import id_words
from pipeline.maintain.check import recorded_config
from pipeline.weights.resolve import is_own
from shards.commit.claims import new_owner
from shards.errors import UserError, WorkFailed
from shards.files import file_sha256, publish_file, temporary_path, translate_os_errors
from shards.format.layout import Layout, Plan, read_plan
from shards.format.records import CacheInfo, Generation, RecordError, unseal
from shards.format.schemas import PLAN_SCHEMA, UNKNOWN_AUDIO, write_parquet
from shards.inspect.findings import Problem, ProgressCallback
from shards.inspect.verify import verify


def repair(path: Path, *, source: str | None = None, progress: ProgressCallback | None = None) -> list[Problem]:
    """Repair the cache at ``path``; return the problems that were found and fixed, [] if it was valid.

    Args:
        path: folder of the cache.
        source: location of the audio, instead of the recorded one.
        progress: called while the cache is verified.

    Raises:
        UserError: the cache does not record how it was extracted, or its source or encoder is not available.
        WorkFailed: the cache still has problems afterwards.
    """
    problems = verify(path, deep=True, progress=progress)
    if not problems:
        return []
    layout = Layout(path)
    try:
        info = CacheInfo.model_validate(unseal(layout.cache))
    except (FileNotFoundError, RecordError, ValueError) as error:
        raise UserError(
            f"'{layout.cache}' cannot be read ({error}), so the settings of the cache are unknown: delete that file "
            "and run `python -m pipeline extract --verify --config …` with its configuration"
        ) from None
    files = {problem.file for problem in problems}
    shards = {problem.shard for problem in problems if problem.shard is not None}
    last = len(info.generations) - 1
    extractions = []
    for number, generation in enumerate(info.generations):
        own = shards & set(range(generation.first_shard, generation.first_shard + generation.shards))
        plan = layout.plan(number)
        relabel = number == last and any(file.startswith("labels/") for file in files)
        if not (own or relabel or number == last or str(plan.relative_to(path)) in files):
            continue
        config = recorded_config(generation.provenance, path, source)
        _refuse_own_encoder(config, path)
        layers = {"layers": [info.spec["layer"]]}
        config = config.model_copy(update={"encoder": config.encoder.model_copy(update=layers)})
        extraction = prepare(config, relabel=relabel, damaged=True)
        extractions.append((extraction, own))
        (target,) = extraction.targets
        if target.layout.path.resolve() != path.resolve():
            raise UserError(
                f"the recorded source and encoder now produce '{target.layout.path}', not '{path}': restore the "
                "original weights, or run the extraction again"
            )
        with translate_os_errors("repairing the cache", path):
            restored = _restore_plan(extraction, layout, number, generation)
            _require_audio(extraction, restored, own)
    for extraction, _ in extractions:
        extraction.targets[0].store.info()  # keeps the provenance of each generation
    with translate_os_errors("repairing the cache", path):
        layout.cache.unlink(missing_ok=True)
    for extraction, own in extractions:
        while jobs := extraction.jobs(shards=own, grow=False):
            for job in jobs:
                run_local(job)
                own -= set(job.plan.shards)
    remaining = verify(path, deep=True)
    if remaining:
        raise WorkFailed(
            f"'{path}' still has {len(remaining)} problems, the first in {remaining[0].file}: {remaining[0].what}"
        )
    return problems


def _refuse_own_encoder(config: ExtractConfig, path: Path) -> None:
    """Raise UserError if a recorded configuration names a class: a cache does not decide what is imported."""
    models = config.encoder.model
    for model in [models] if isinstance(models, str) else models or []:
        if is_own(model):
            raise UserError(
                f"'{path}' was made by the encoder class {model}, which is not part of earshard, and a cache does not "
                "decide what is imported: if you know this class, run `python -m pipeline extract --verify` with the "
                "configuration of the cache"
            )


def _restore_plan(extraction: Extraction, layout: Layout, number: int, generation: Generation) -> Plan:
    """Return the plan of a generation; a plan that is missing or corrupt is made again from the same utterances.

    Raises:
        UserError: the source does not give the same plan.
    """
    path = layout.plan(number)
    if path.is_file() and file_sha256(path) == generation.plan_id:
        return read_plan(path)
    from shards.commit.finalize import read_shard_rows

    keys: list[pa.ChunkedArray] = []
    for shard in range(generation.first_shard, generation.first_shard + generation.shards):
        try:
            record = unseal(layout.record(shard))
            keys.append(read_shard_rows(layout.rows(shard), record)["key"])
            keys.append(pa.chunked_array([pa.array([each["key"] for each in record["failures"]], pa.string())]))
        except (OSError, RecordError):
            continue
    listed = extraction.rows["key"]
    known = pa.chunked_array([chunk for column in keys for chunk in column.chunks], pa.string()).combine_chunks()
    everything = np.arange(len(listed))
    partial = temporary_path(path, new_owner())
    unknown = pa.array([UNKNOWN_AUDIO], pa.binary(32)).take(pa.array(np.zeros(len(listed), np.int64)))
    for chosen in (np.flatnonzero(pc.is_in(listed, value_set=known).to_numpy()), everything):
        for ids in (extraction.audio_ids, unknown):
            extraction.audio_ids, before = ids, extraction.audio_ids
            try:
                write_parquet(partial, PLAN_SCHEMA, extraction.make_plan(chosen, generation.first_shard))
            finally:
                extraction.audio_ids = before
            if file_sha256(partial) == generation.plan_id:
                publish_file(partial, path, replace=True)
                return read_plan(path)
    partial.unlink(missing_ok=True)
    raise UserError(
        f"the plan '{path}' is corrupt, and the recorded source now gives another plan: restore the original audio, or "
        "extract with another source.name, which copies the intact features"
    )


def _require_audio(extraction: Extraction, plan: Plan, shards: set[int]) -> None:
    """Check that the source has the audio that ``shards`` were made from; UserError if it does not."""
    planned = plan.columns("key", "audio_id", "shard")
    planned = planned.filter(pc.is_in(planned["shard"], value_set=pa.array(sorted(shards), pa.int32())))
    at = pc.index_in(planned["key"], value_set=extraction.rows["key"].combine_chunks())
    found = id_words(extraction.audio_ids.take(at.combine_chunks().fill_null(0)))
    wanted = id_words(planned["audio_id"])
    other = ~at.is_valid().to_numpy() | (np.any(wanted != 0, axis=1) & np.any(wanted != found, axis=1))
    if other.any():
        first = planned["key"][int(other.argmax())]
        raise UserError(
            f"the source no longer has the audio of {other.sum()} of {len(planned)} utterances to extract again, such "
            f"as '{first}': restore the original audio, or run the extraction, which encodes the new audio"
        )
