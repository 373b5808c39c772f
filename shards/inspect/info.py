"""Contents, size, codec error and provenance of a cache: the output of ``python -m shards info``.

Takes a cache folder or its URL, complete or not; returns a JSON-serializable mapping and the lines that display it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import ValidationError

from shards.commit.finalize import COUNTS
from shards.errors import UserError, first_validation_error
from shards.format.layout import Layout, read_plan
from shards.format.records import CacheInfo, Generation, RecordError, ShardRecord, unseal
from shards.format.schemas import FAILURE_SCHEMA, MANIFEST_SCHEMA, PLAN_SCHEMA, check_parquet, read_parquet
from shards.format.spec import FeatureSpec
from shards.format.variants import are_variants
from shards.inspect.snapshot import snapshot
from shards.labels.store import read_index
from shards.remote.client import is_url


def describe_cache(cache: str | Path) -> dict[str, Any]:
    """Return identity, counts, sizes and provenance of the cache at a path or URL.

    Returns:
        ``complete``, ``path``, ``counts`` and ``unfinished``. For a complete cache also ``feature_id``,
        ``manifest_id``, ``plan_id``, ``generation`` and ``provenance`` (of the newest generation), ``spec``,
        ``generations``, ``labels`` (the label sets, oldest first), ``hours``, ``bytes_per_audio_hour``,
        ``bits_per_value`` (bits of all tars divided by the number of values), ``codec_error``, ``seconds`` (spent
        extracting all shards) and ``encode_seconds`` (the part spent in the encoder; 0 if it was not recorded).
        Superseded rows are counted in all of them. The counts of a local cache are compared with its tables and tars.
        ``unfinished`` is None, or number and counts of the first generation that ``CACHE.json`` does not list yet.

    Raises:
        UserError: there is no cache, it has another format, its CACHE.json, LABELS.json or a plan is corrupt, or
            CACHE.json counts what is not there.
    """
    if is_url(cache):
        with snapshot(str(cache), tables=False) as copy:
            return _describe(Layout(copy), str(cache), lambda number, entry: {})
    layout = Layout(Path(cache))
    return _describe(layout, str(cache), lambda number, entry: _count(layout, number, entry))


def _describe(layout: Layout, name: str, count: Callable[[int, Generation], dict[str, int]]) -> dict[str, Any]:
    where = f"'{name}/{layout.cache.name}'"
    try:
        info = unseal(layout.cache)
    except (FileNotFoundError, NotADirectoryError):
        return _incomplete(layout, name)
    except (RecordError, OSError) as error:
        raise UserError(f"{where} is corrupt ({error}): run `python -m shards verify {name}`") from None
    spec = FeatureSpec.parse(info.get("spec"), where)
    try:
        parsed = CacheInfo.model_validate(info)
        _require_counts(parsed, count)
        counts, newest, raw = parsed.counts, parsed.generations[-1], info["generations"]
        hours = counts["samples"] / spec.sampling_rate / 3600
        values = counts["frames"] * spec.channels
        about: dict[str, Any] = {
            "complete": True,
            "path": name,
            "feature_id": parsed.feature_id,
            "manifest_id": parsed.manifest_id,
            "plan_id": newest.plan_id,
            "generation": len(raw) - 1,
            "spec": spec.model_dump(),
            "counts": counts,
            "hours": hours,
            "bytes_per_audio_hour": counts["bytes"] / hours if hours else 0.0,
            "bits_per_value": 8 * counts["bytes"] / values if values else 0.0,
            "codec_error": _codec_error(raw),
            "seconds": sum(float(entry["seconds"]) for entry in raw),
            "encode_seconds": sum(float(entry.get("encode_seconds", 0.0)) for entry in raw),
            "provenance": newest.provenance,
            "generations": [
                {
                    "number": number,
                    "manifest_id": entry.manifest_id,
                    "rows": entry.counts["utterances"],
                    "failures": entry.counts["failures"],
                    "first_shard": entry.first_shard,
                    "shards": entry.shards,
                    "bytes": entry.counts["bytes"],
                    "finished": str(entry.provenance.get("finished", "")),
                }
                for number, entry in enumerate(parsed.generations)
            ],
        }
    except (pa.ArrowException, RecordError, OSError, KeyError, TypeError, ValueError, OverflowError) as error:
        what = first_validation_error(error) if isinstance(error, ValidationError) else error
        raise UserError(
            f"{where} has missing or invalid fields ({what}): run `python -m shards verify {name}`"
        ) from None
    index = read_index(layout.path)
    about["labels"] = [
        {"current": index.current(entry.name) is entry, **entry.model_dump(mode="json", by_alias=True)}
        for entry in index.sets
    ]
    return {**about, "unfinished": _unfinished(layout, name, about["generation"] + 1)}


def _require_counts(info: CacheInfo, count: Callable[[int, Generation], dict[str, int]]) -> None:
    """Require that each generation counts what ``count`` finds of it, and the cache the sum of its generations."""
    for number, entry in enumerate(info.generations):
        for name, value in count(number, entry).items():
            if entry.counts.get(name) != value:
                raise ValueError(f"{entry.counts.get(name)} {name} in generation {number}, found {value}")
    for name in COUNTS:
        total = sum(entry.counts[name] for entry in info.generations)
        if info.counts.get(name) != total:
            raise ValueError(f"{info.counts.get(name)} {name}, the generations have {total}")
    if not 0 <= info.counts.get("superseded", 0) <= (info.counts["utterances"] if len(info.generations) > 1 else 0):
        raise ValueError(f"{info.counts['superseded']} superseded rows")
    if not 0 <= info.counts.get("variants", 0) <= sum(each.counts.get("variants", 0) for each in info.generations):
        raise ValueError(f"{info.counts['variants']} variants")


def _count(layout: Layout, number: int, entry: Generation) -> dict[str, int]:
    """Count rows, frames, samples and bytes of a generation in its tables and tars."""
    columns = ["frames", "samples"]
    check_parquet(layout.manifest(number), MANIFEST_SCHEMA)
    check_parquet(layout.plan(number), PLAN_SCHEMA)
    manifest = pq.read_table(layout.manifest(number), columns=columns)
    shards = range(entry.first_shard, entry.first_shard + entry.shards)
    varied = {}
    if "variants" in entry.counts:
        varied["variants"] = int(are_variants(pq.read_table(layout.manifest(number), columns=["key"])["key"]).sum())
    return {
        **varied,
        "planned": pq.read_metadata(layout.plan(number)).num_rows,
        "utterances": len(manifest),
        "failures": len(read_parquet(layout.failures(number), FAILURE_SCHEMA)),
        **{name: pc.sum(manifest[name]).as_py() or 0 for name in columns},
        "bytes": sum(layout.tar(shard).stat().st_size for shard in shards),
    }


def _codec_error(entries: list[dict[str, Any]]) -> dict[str, float]:
    """Combine the errors of the generations: the mean over all utterances, and the worst."""
    weights = [entry["counts"]["utterances"] for entry in entries]
    means, worst = ([float(entry["codec_error"][name]) for entry in entries] for name in ("mean", "max"))
    total = sum(mean * weight for mean, weight in zip(means, weights, strict=True))
    return {"mean": total / max(sum(weights), 1), "max": max(worst)}


def _unfinished(layout: Layout, name: str, generation: int) -> dict[str, Any] | None:
    """Return number and counts of a generation that is being extracted; None if it has no plan."""
    try:
        plan = read_plan(layout.plan(generation), name)
    except FileNotFoundError:
        return None
    records = []
    for shard in plan.shards:
        try:
            record = ShardRecord.model_validate(unseal(layout.record(shard)))
        except (OSError, RecordError, ValidationError):
            continue
        if record.plan_id == plan.id:
            records.append(record)
    return {
        "generation": generation,
        "plan_id": plan.id,
        "planned": len(plan),
        "utterances": sum(record.rows for record in records),
        "failures": sum(len(record.failures) for record in records),
        "shards": plan.num_shards,
        "committed": len(records),
    }


def _incomplete(layout: Layout, name: str) -> dict[str, Any]:
    """Describe a cache without CACHE.json; it has several generations if `repair` is making one of them again."""
    found = [part for number in range(layout.num_plans()) if (part := _unfinished(layout, name, number))]
    if not found:
        raise UserError(f"'{name}' is not a cache: it has neither CACHE.json nor plans/000.parquet; run `make extract`")
    counted = ("planned", "utterances", "failures", "shards", "committed")
    counts = {count: sum(part[count] for part in found) for count in counted}
    first = next((part for part in found if part["committed"] < part["shards"]), found[-1])
    return {"complete": False, "path": name, "plan_id": first["plan_id"], "counts": counts, "unfinished": first}


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
    width = f"{spec['channels']} channels"
    if codes := spec["codec"] == "u16":
        width = f"codes of {spec['channels']} codebooks of {spec['frontend']['codebook_size']:,} entries"
    yield f"  features      {spec['family']} layer {spec['layer']}, {width}, codec {spec['codec']}"
    yield (
        f"  computed      {spec['dtype']}, window {window}, overlap {spec['overlap']} s, trim {spec['trim']}, "
        f"{spec['sampling_rate'] / spec['hop']:g} frames per second"
    )
    yield f"  feature id    {about['feature_id']}"
    yield f"  manifest id   {about['manifest_id']}"
    yield f"  source        {_line(source.get('name', '?'))}"
    yield (
        f"  encoder       {_line(encoder.get('reference', '?'))} ({_line(encoder.get('device', '?'))}, "
        f"{spec['tensors'][:8]})"
    )
    superseded = f", {counts['superseded']:,} superseded" if counts.get("superseded") else ""
    yield (
        f"  utterances    {counts['utterances']:,} of {counts['planned']:,} planned, {counts['failures']:,} failed"
        f"{superseded}, in {counts['shards']:,} shards"
    )
    if counts.get("variants"):
        utterances = counts["utterances"] - counts.get("superseded", 0) - counts["variants"]
        yield f"  variants      {counts['variants']:,} of these are variants (KEY~1, …) of the other {utterances:,}"
    if len(about["generations"]) > 1:
        yield from map(_generation_line, about["generations"])
    if (part := about["unfinished"]) is not None:
        committed = f"{part['committed']:,} of {part['shards']:,} shards committed"
        yield f"  note          generation {part['generation']} is unfinished: {committed}; rerun the extraction"
    for entry in about["labels"]:
        mark = "" if entry["current"] else ", replaced by a newer one"
        yield f"  labels        {entry['name']} {entry['id'][:8]}, {entry['rows']:,} rows{mark}"
    yield f"  audio         {about['hours']:.3f} h, {counts['frames']:,} frames"
    yield f"  bits/value    {about['bits_per_value']:.2f} including tar headers and texts"
    if codes:
        yield "  codec error   none: codes are stored as they are"
    else:
        yield f"  codec error   mean {error['mean']:.2e}, worst {error['max']:.2e} (relative RMS)"
    yield from format_cost(about)


def _generation_line(part: dict[str, Any]) -> str:
    finished = f", finished {_line(part['finished'])}" if part["finished"] else ""
    return f"  generation {part['number']:<2} {part['rows']:,} utterances in {part['shards']:,} shards{finished}"


def _line(value: Any) -> str:
    """Return a value of the free-form provenance as printable text."""
    return "".join(c if c.isprintable() else "�" for c in str(value)[:200])


def format_cost(about: dict[str, Any]) -> Iterator[str]:
    """Format the size of a complete cache and the time spent extracting it."""
    yield f"  bytes         {about['counts']['bytes']:,} ({about['bytes_per_audio_hour'] / 1e6:,.1f} MB/h of audio)"
    encoder = f", of which {about['encode_seconds']:,.1f} s in the encoder" if about["encode_seconds"] else ""
    yield f"  time          {about['seconds']:,.1f} s of extraction{encoder}"
