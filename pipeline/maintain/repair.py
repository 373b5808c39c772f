"""Re-extract exactly the shards that fail verification.

    python -m pipeline repair CACHE

Reads every byte of the cache (``shards/inspect/verify.py``), extracts shards with a problem again from the recorded
source with the recorded settings, and rewrites all merged files.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.extract.job import prepare_job, schedule
from pipeline.extract.local import run_local
from pipeline.maintain.check import recorded_config
from shards.errors import UserError, WorkFailed
from shards.files import translate_os_errors
from shards.format.layout import Layout
from shards.format.records import RecordError, unseal
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
        info = unseal(layout.cache)
    except (FileNotFoundError, RecordError) as error:
        raise UserError(
            f"'{layout.cache}' cannot be read ({error}), so the settings of the cache are unknown: delete that file "
            "and run `python -m pipeline extract --verify --config …` with its configuration"
        ) from None
    layer = info["spec"]["layer"]
    config = recorded_config(info, path, source)
    config = config.model_copy(update={"encoder": config.encoder.model_copy(update={"layers": [layer]})})
    with translate_os_errors("repairing the cache", path):
        if any(problem.file == layout.plan.name for problem in problems):
            layout.plan.unlink(missing_ok=True)  # rewritten below; the same corpus and settings give the same plan
    job = prepare_job(config)
    (target,) = job.targets
    if target.layout.path.resolve() != path.resolve() or job.plan.id != info["plan_id"]:
        raise UserError(
            f"the recorded source and encoder now produce '{target.layout.path}', not '{path}': restore the original "
            "audio and weights, or run the extraction again"
        )
    schedule(job, shards={problem.shard for problem in problems if problem.shard is not None})
    layout.cache.unlink(missing_ok=True)
    run_local(job)
    remaining = verify(path, deep=True)
    if remaining:
        raise WorkFailed(
            f"'{path}' still has {len(remaining)} problems, the first in {remaining[0].file}: {remaining[0].what}"
        )
    return problems
