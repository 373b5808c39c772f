"""The end of an extraction: the rows of all committed shards become the cache's manifest, ``CACHE.json`` comes last.

    python -m pipeline merge CACHE…

In: a cache folder whose shards are all committed. Out: the same folder, complete. Any process may do it, any number of
times; one does it at a time. Every extraction ends with it; by hand it is for caches whose last worker was lost between
its last commit and the end. ``job.json``, written beside the plan before the first shard, says all that a merge needs,
so that none needs the encoder or the audio.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from shards.commit.claims import LEASE, new_owner
from shards.commit.store import Store, open_store
from shards.errors import UserError, WorkFailed
from shards.format.layout import Plan
from shards.format.records import RecordError
from shards.format.spec import SCHEMA_VERSION, FeatureSpec

POLL = 0.5  # seconds between two looks at what another process does


def write_job(store: Store, spec: FeatureSpec, plan_id: str, about: dict[str, Any]) -> None:
    """Put ``job.json`` beside the plan: spec, ids, provenance. One that stands is left."""
    tree = {
        "schema_version": SCHEMA_VERSION,
        "feature_id": spec.feature_id,
        "spec": spec.model_dump(),
        "plan_id": plan_id,
        "provenance": about,
    }
    store.write_job(tree)


def merge(cache: str | Path, lease: float = LEASE) -> bool:
    """Complete the cache at a path or URL; False when it was complete already.

    Raises:
        UserError: it is no cache, or does not say what it is to become.
        WorkFailed: shards are not committed yet.
    """
    store = open_store(str(cache))
    plan = store.plan()
    if plan is None:
        raise UserError(f"'{cache}' is no cache: it has no plan.parquet; make one with `make extract`")
    spec, about = _read_job(store, plan)
    if store.is_complete(spec.feature_id, plan.id):
        return False
    absent = [shard for shard in range(plan.shards) if store.committed(shard, spec.feature_id, plan.id) is None]
    if absent:
        raise WorkFailed(
            f"{len(absent)} of {plan.shards} shards of '{cache}' are not committed, the first is {absent[0]:06d}: run "
            "the same extraction again"
        )
    with store.at_work(new_owner(), lease):
        complete(store, spec, plan, about)
    return True


def complete(store: Store, spec: FeatureSpec, plan: Plan, about: dict[str, Any]) -> None:
    """Merge a cache whose shards are all committed, unless another process does: then wait until it is complete."""
    about = {**about, "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    while not store.is_complete(spec.feature_id, plan.id):
        if store.take(None):
            try:
                store.finish(spec, plan, about)
            finally:
                store.release(None)
        else:
            time.sleep(POLL)


def _read_job(store: Store, plan: Plan) -> tuple[FeatureSpec, dict[str, Any]]:
    """Spec and provenance of the cache, from ``job.json``."""
    where = f"'{store.location}/job.json'"
    try:
        tree = store.job()
        if tree["plan_id"] != plan.id:
            raise RecordError("it is of another plan")
        return FeatureSpec.parse(tree["spec"], where), dict(tree["provenance"])
    except FileNotFoundError:
        reason = "is missing"
    except (RecordError, KeyError, TypeError) as error:
        reason = f"is damaged ({error})"
    raise UserError(f"{where} {reason}, so the cache does not say what it is: run its extraction again instead")
