"""Contents, size, codec error and provenance of a cache: the output of ``python -m shards info``.

Takes a cache folder or its URL, complete or not; returns a JSON-serializable mapping and the lines that display it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from shards.errors import UserError, first_validation_error
from shards.format.layout import Layout, read_plan
from shards.format.records import CacheInfo, RecordError, ShardRecord, unseal
from shards.format.spec import FeatureSpec
from shards.remote.client import is_url
from shards.remote.snapshot import snapshot


def describe_cache(cache: str | Path) -> dict[str, Any]:
    """Return identity, counts, sizes and provenance of the cache at a path or URL.

    Returns:
        ``complete``, ``path`` and ``counts``. For a complete cache also ``feature_id``, ``manifest_id``, ``spec``,
        ``hours``, ``bytes_per_audio_hour``, ``bits_per_value`` (bits of all tars divided by the number of values),
        ``codec_error``, ``seconds`` (spent extracting all shards), ``encode_seconds`` (the part spent in the encoder;
        0 if it was not recorded) and ``provenance``.

    Raises:
        UserError: there is no cache, or its CACHE.json is corrupt.
    """
    if is_url(cache):
        with snapshot(str(cache), tables=False) as copy:
            return _describe(Layout(copy), str(cache))
    return _describe(Layout(Path(cache)), str(cache))


def _describe(layout: Layout, name: str) -> dict[str, Any]:
    where = f"'{name}/{layout.cache.name}'"
    try:
        info = unseal(layout.cache)
    except (FileNotFoundError, NotADirectoryError):
        return _incomplete(layout, name)
    except (RecordError, OSError) as error:
        raise UserError(f"{where} is corrupt ({error}): run `python -m shards verify {name}`") from None
    spec = FeatureSpec.parse(info.get("spec"), where)
    try:
        counts = CacheInfo.model_validate(info).counts
        if not isinstance(info["provenance"], dict):
            raise TypeError("provenance")
        hours = counts["samples"] / spec.sampling_rate / 3600
        values = counts["frames"] * spec.channels
        return {
            "complete": True,
            "path": name,
            "feature_id": info["feature_id"],
            "manifest_id": info["manifest_id"],
            "plan_id": info["plan_id"],
            "spec": spec.model_dump(),
            "counts": counts,
            "hours": hours,
            "bytes_per_audio_hour": counts["bytes"] / hours if hours else 0.0,
            "bits_per_value": 8 * counts["bytes"] / values if values else 0.0,
            "codec_error": {name: float(info["codec_error"][name]) for name in ("mean", "max")},
            "seconds": float(info["seconds"]),
            "encode_seconds": float(info.get("encode_seconds", 0.0)),
            "provenance": info["provenance"],
        }
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        what = first_validation_error(error) if isinstance(error, ValidationError) else error
        raise UserError(
            f"{where} has missing or invalid fields ({what}): run `python -m shards verify {name}`"
        ) from None


def _incomplete(layout: Layout, name: str) -> dict[str, Any]:
    plan = read_plan(layout, name)
    records = []
    for shard in range(plan.num_shards):
        try:
            records.append(ShardRecord.model_validate(unseal(layout.record(shard))))
        except (OSError, RecordError, ValidationError):
            continue
    counts = {
        "planned": len(plan.table),
        "utterances": sum(record.rows for record in records),
        "failures": sum(len(record.failures) for record in records),
        "shards": plan.num_shards,
        "committed": len(records),
    }
    return {"complete": False, "path": name, "plan_id": plan.id, "counts": counts}


def format_info(about: dict[str, Any]) -> Iterator[str]:
    """Format the mapping returned by :func:`describe_cache` as lines of text."""
    counts = about["counts"]
    yield about["path"]
    if not about["complete"]:
        yield f"  not complete: {counts['committed']} of {counts['shards']} shards committed"
        yield f"  {counts['utterances']} of {counts['planned']} utterances, {counts['failures']} failures"
        yield "  rerun the same extraction to finish it"
        return
    spec, error, provenance = about["spec"], about["codec_error"], about["provenance"]
    parts = [
        provenance.get(name) for name in ("source", "encoder")
    ]  # free form: any field may be missing or of any type
    source, encoder = (part if isinstance(part, dict) else {} for part in parts)
    window = f"{spec['window']} with {spec['margin']} s of margin" if "margin" in spec else spec["window"]
    yield f"  features      {spec['family']} layer {spec['layer']}, {spec['channels']} channels, codec {spec['codec']}"
    yield (
        f"  computed      {spec['dtype']}, window {window}, overlap {spec['overlap']} s, trim {spec['trim']}, "
        f"{spec['sampling_rate'] / spec['hop']:g} frames per second"
    )
    yield f"  feature id    {about['feature_id']}"
    yield f"  manifest id   {about['manifest_id']}"
    yield f"  source        {source.get('name', '?')} (fingerprint {str(source.get('fingerprint', '?'))[:8]})"
    yield f"  encoder       {encoder.get('reference', '?')} ({encoder.get('device', '?')}, {spec['tensors'][:8]})"
    yield (
        f"  utterances    {counts['utterances']:,} of {counts['planned']:,} planned, {counts['failures']:,} failed, "
        f"in {counts['shards']:,} shards"
    )
    yield f"  audio         {about['hours']:.3f} h, {counts['frames']:,} frames"
    yield f"  bits/value    {about['bits_per_value']:.2f} including tar headers and texts"
    yield f"  codec error   mean {error['mean']:.2e}, worst {error['max']:.2e} (relative RMS)"
    yield from format_cost(about)


def format_cost(about: dict[str, Any]) -> Iterator[str]:
    """Format the size of a complete cache and the time spent extracting it."""
    yield f"  bytes         {about['counts']['bytes']:,} ({about['bytes_per_audio_hour'] / 1e6:,.1f} MB/h of audio)"
    encoder = f", of which {about['encode_seconds']:,.1f} s in the encoder" if about["encode_seconds"] else ""
    yield f"  time          {about['seconds']:,.1f} s of extraction{encoder}"
