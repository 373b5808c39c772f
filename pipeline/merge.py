"""The end of an extraction: the rows of all committed shards become the cache's manifest, ``CACHE.json`` comes last.

    python -m pipeline merge CACHE…

In: a cache folder whose shards are all committed. Out: the same folder, complete. Any process may do it, any number of
times; one does it at a time. Every extraction ends with it; by hand it is for caches whose last worker was lost between
its last commit and the end. ``job.json``, written beside the plan before the first shard, says all that a merge needs,
so that none needs the encoder or the audio.
"""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from shards.claims import LEASE, Claims, new_owner
from shards.disk import told, write_new
from shards.errors import UserError, WorkFailed
from shards.manifest import (
    Layout,
    Plan,
    RecordError,
    committed,
    finalise,
    is_complete,
    is_tidy,
    read_plan,
    seal,
    sweep,
    unseal,
)
from shards.spec import SCHEMA_VERSION, FeatureSpec

POLL = 0.5  # seconds between two looks at what another process does


def write_job(layout: Layout, spec: FeatureSpec, plan_id: str, about: dict[str, Any], owner: str) -> None:
    """Put ``job.json`` beside the plan: spec, ids, provenance. One that stands is left."""
    if layout.job.exists():
        return
    tree = {
        "schema_version": SCHEMA_VERSION,
        "feature_id": spec.feature_id,
        "spec": spec.model_dump(),
        "plan_id": plan_id,
        "provenance": about,
    }
    with told("writing the job's file", layout.path):
        write_new(layout.job, seal(tree), owner)


def merge(path: Path, lease: float = LEASE) -> bool:
    """Complete the cache at ``path``; False when it was complete already.

    Raises:
        UserError: it is no cache, or does not say what it is to become.
        WorkFailed: shards are not committed yet.
    """
    layout = Layout(path)
    plan = read_plan(layout)
    spec, about = _read_job(layout, plan)
    if is_complete(layout, spec.feature_id, plan.id):
        return False
    absent = [shard for shard in range(plan.shards) if committed(layout, shard, spec.feature_id, plan.id) is None]
    if absent:
        raise WorkFailed(
            f"{len(absent)} of {plan.shards} shards of '{path}' are not committed, the first is {absent[0]:06d}: run "
            "the same extraction again"
        )
    with Claims(new_owner(), lease) as claims:
        complete(layout, spec, plan, claims, about)
    return True


def complete(layout: Layout, spec: FeatureSpec, plan: Plan, claims: Claims, about: dict[str, Any]) -> None:
    """Merge a cache whose shards are all committed, unless another process does: then wait until it is complete."""
    about = {**about, "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    while not is_complete(layout, spec.feature_id, plan.id):
        with told("finishing the cache", layout.path):
            if claims.take(layout.finishing):
                try:
                    sweep(layout)
                    finalise(layout, spec, plan, claims.owner, about)
                finally:
                    claims.release(layout.finishing)
            else:
                time.sleep(POLL)


def tidy(layout: Layout, claims: Claims) -> None:
    """Remove what processes left that were killed after their last commit. A read-only folder stays as it is."""
    with suppress(OSError):
        if not is_tidy(layout) and claims.take(layout.finishing):
            sweep(layout)
            claims.release(layout.finishing)


def _read_job(layout: Layout, plan: Plan) -> tuple[FeatureSpec, dict[str, Any]]:
    """Spec and provenance of the cache, from ``job.json``."""
    try:
        tree = unseal(layout.job)
        if tree["plan_id"] != plan.id:
            raise RecordError("it is of another plan")
        return FeatureSpec.parse(tree["spec"], f"'{layout.job}'"), dict(tree["provenance"])
    except FileNotFoundError:
        reason = "is missing"
    except (RecordError, KeyError, TypeError) as error:
        reason = f"is damaged ({error})"
    raise UserError(f"'{layout.job}' {reason}, so the cache does not say what it is: run its extraction again instead")
