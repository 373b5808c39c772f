"""Whatever stands in a file of a cache, reading it ends in a result or in one of our own errors; never in a crash.

The bytes are honest ones that hypothesis bends (bytes changed, cut out, doubled, put in) or none at all.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_faults import make_small_cache

from shards.commit.writer import npy_parts
from shards.errors import UserError
from shards.format.layout import Layout
from shards.format.npy import NpyError, parse_npy_header
from shards.format.records import RecordError, seal, unseal
from shards.format.schemas import FAILURE_SCHEMA, MANIFEST_SCHEMA, PLAN_SCHEMA, read_parquet
from shards.format.spec import FeatureSpec
from shards.format.tar import BLOCK_SIZE, TarError, iter_members, pack_header
from shards.inspect.info import describe_cache, format_info
from shards.inspect.verify import verify
from shards.read.cache import Cache

Edit = tuple[int, int, bytes]


@pytest.fixture(scope="module")
def layout(tmp_path_factory) -> Layout:
    return Layout(make_small_cache(tmp_path_factory.mktemp("fuzz") / "cache"))


def edits(most: int = 5) -> st.SearchStrategy[list[Edit]]:
    """(place, bytes taken out there, bytes put in there), a few times over."""
    put = st.binary(max_size=8) | st.sampled_from(
        [b"\0" * 512, b"\xff" * 8, b"7" * 11, b"NaN", b"[[[[", b"-1", b"\\ud800"]
    )
    return st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 9), put), max_size=most)


def bend(data: bytes, changes: list[Edit]) -> bytes:
    for place, gone, put in changes:
        at = place % (len(data) + 1)
        data = data[:at] + put + data[at + gone :]
    return data


def check_sentence(error: Exception) -> None:
    assert 10 < len(str(error)) < 1000
    assert "\n" not in str(error)


def fuzz(cases: int, case: Callable[..., None], *strategies: st.SearchStrategy) -> None:
    run = settings(max_examples=cases, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    run(given(*strategies)(case))()


def fuzz_tar(layout: Layout, cases: int) -> None:
    honest = layout.tar(0).read_bytes()
    allowed = st.builds(bend, st.just(honest), edits()) | st.binary(max_size=2 * BLOCK_SIZE)
    sizes = st.builds(lambda n: pack_header("a.npy", n) + bytes(1024), st.integers(0, (1 << 33) - 1))

    def case(data: bytes) -> None:
        try:
            for member in iter_members(memoryview(data)):
                assert 0 <= member.offset <= member.offset + member.length <= len(data)
                assert "/" not in member.name
        except TarError as error:
            check_sentence(error)

    fuzz(cases, case, allowed | sizes)


def fuzz_npy(layout: Layout, cases: int) -> None:
    import numpy as np

    honest = b"".join(npy_parts(np.ones((7, 4), np.float16)))
    head = st.builds(
        lambda d, f, s: f"{{'descr': '{d}', 'fortran_order': {f}, 'shape': {s}, }}".ljust(117).encode() + b"\n",
        st.sampled_from(["<f2", "<f4", "|O", "<U9", "|V8", "<u2"]),
        st.booleans(),
        st.lists(st.integers(-2, 10**12), max_size=3).map(tuple),
    )
    built = st.builds(lambda h, body: b"\x93NUMPY\x01\x00" + len(h).to_bytes(2, "little") + h + body, head, st.binary())
    bent = st.builds(bend, st.just(honest), edits())

    def case(data: bytes) -> None:
        try:
            dtype, shape, start = parse_npy_header(memoryview(data))
            assert int(np.prod(shape, dtype=object)) * dtype.itemsize == len(data) - start
        except NpyError as error:
            check_sentence(error)

    fuzz(cases, case, bent | built | st.binary(max_size=300))


def fuzz_json(layout: Layout, cases: int) -> None:
    path, honest = layout.path / "fuzzed.json", layout.cache.read_bytes()
    tree = json.loads(honest)
    del tree["sha256"]
    values = st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
        max_leaves=6,
    )
    fields = st.dictionaries(st.sampled_from(sorted(tree)), values, max_size=3)
    spec = st.dictionaries(st.sampled_from(sorted(tree["spec"])), values, max_size=3)
    lies = st.builds(lambda f, s: seal({**tree, "spec": {**tree["spec"], **s}, **f}), fields, spec)

    def case(data: bytes) -> None:
        path.write_bytes(data)
        try:
            FeatureSpec.parse(unseal(path).get("spec"), "CACHE.json")
        except (RecordError, UserError) as error:
            check_sentence(error)

    fuzz(cases, case, lies | st.builds(bend, st.just(honest), edits()) | st.binary(max_size=200))


def fuzz_cache(layout: Layout, cases: int) -> None:
    """CACHE.json with a whole seal and other values: opening and verifying."""
    honest = layout.cache.read_bytes()
    tree = json.loads(honest)
    del tree["sha256"]
    odd = (
        st.none()
        | st.integers(-(2**70), 2**70)
        | st.text(max_size=5)
        | st.just([])
        | st.just({})
        | st.floats(-1e300, 1e300)
    )
    places = [*paths(tree)]

    def case(place: tuple[str | int, ...], value: object) -> None:
        changed = json.loads(json.dumps(tree))
        *outer, last = place
        inner = changed
        for step in outer:
            inner = inner[step]
        inner[last] = value
        layout.cache.write_bytes(seal(changed))
        for read in (
            verify,
            lambda path: Cache.open(path).features(0),
            lambda path: list(format_info(describe_cache(path))),
        ):
            try:
                read(layout.path)
            except UserError as error:
                check_sentence(error)

    try:
        fuzz(cases, case, st.sampled_from(places), odd)
    finally:
        layout.cache.write_bytes(honest)


def paths(tree: object) -> Iterator[tuple[str | int, ...]]:
    """Yield the path of every value in a JSON tree."""
    inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for name, value in inner:
        yield (name,)
        yield from ((name, *rest) for rest in paths(value))


def fuzz_labels(layout: Layout, cases: int) -> None:
    """LABELS.json with a whole seal and other values, and label files of other bytes: opening."""
    index = layout.labels / "LABELS.json"
    newest = max(i for i, entry in enumerate(json.loads(index.read_bytes())["sets"]) if entry["name"] == "source")
    file = layout.labels / json.loads(index.read_bytes())["sets"][newest]["file"]["name"]
    honest = {path: path.read_bytes() for path in (index, file)}
    tree = json.loads(honest[index])
    del tree["sha256"]
    odd = st.none() | st.integers(-(2**70), 2**70) | st.text(max_size=5) | st.just([]) | st.just({}) | st.floats()
    finite = odd.filter(lambda value: value == value and value not in (float("inf"), float("-inf")))

    def case(place: tuple[str | int, ...] | None, value: object, changes: list[Edit]) -> None:
        changed = json.loads(json.dumps(tree))
        data = honest[file]
        if place is None:  # other bytes whose hash the index has
            data = bend(data, changes)
            info = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            changed["sets"][newest]["file"] |= info
        else:
            *outer, last = place
            inner = changed
            for step in outer:
                inner = inner[step]
            inner[last] = value
        file.write_bytes(data)
        index.write_bytes(seal(changed))
        try:
            Cache.open(layout.path).strings("text", [0])
        except UserError as error:
            check_sentence(error)

    try:
        fuzz(cases, case, st.none() | st.sampled_from([*paths(tree)]), finite, edits())
    finally:
        for path, data in honest.items():
            path.write_bytes(data)


def fuzz_parquet(layout: Layout, cases: int) -> None:
    path = layout.path / "fuzzed.parquet"
    files = [(layout.plan(0), PLAN_SCHEMA), (layout.rows(0), MANIFEST_SCHEMA), (layout.failures(0), FAILURE_SCHEMA)]
    honest = [(file.read_bytes(), schema) for file, schema in files]

    def case(which: int, changes: list[Edit]) -> None:
        data, schema = honest[which]
        path.write_bytes(bend(data, changes))
        try:
            assert read_parquet(path, schema).schema == schema
        except RecordError as error:
            check_sentence(error)

    fuzz(cases, case, st.integers(0, 2), edits(3))


FUZZERS = {
    "tar": (fuzz_tar, 150, 35_000),
    "npy": (fuzz_npy, 150, 35_000),
    "json": (fuzz_json, 100, 19_000),
    "labels": (fuzz_labels, 60, 1_000),
    "parquet": (fuzz_parquet, 80, 8_500),
    "cache": (fuzz_cache, 60, 1_500),
}


@pytest.mark.parametrize("name", FUZZERS)
def test_a_bent_file_ends_in_a_result_or_in_a_sentence(layout, name):
    fuzzer, cases, _ = FUZZERS[name]
    fuzzer(layout, cases)


@pytest.mark.slow
@pytest.mark.parametrize("name", FUZZERS)
def test_a_hundred_thousand_bent_files_end_in_a_result_or_in_a_sentence(layout, name, capsys):
    fuzzer, _, cases = FUZZERS[name]
    started = time.perf_counter()
    fuzzer(layout, cases)
    with capsys.disabled():
        print(f"\nfuzz {name}: {cases} cases in {time.perf_counter() - started:.0f} s, none but our own errors")


def test_a_hundred_thousand_cases_are_meant():
    assert sum(cases for _, _, cases in FUZZERS.values()) == 100_000
    assert all(Path(__file__).read_text().count(f"def fuzz_{name}(") == 1 for name in FUZZERS)
