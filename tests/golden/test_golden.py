"""Caches and training runs stay as recorded in ``digests.json`` (``make golden`` records them again).

A refactoring changes no digest. ``regenerate.py`` documents what is recorded and how it is compared.
"""

from __future__ import annotations

import copy
import json

import pytest
from inputs import write_inputs
from regenerate import (
    CODECS,
    DIGESTS,
    EXPERIMENTS,
    KILLED,
    differences,
    fingerprint,
    record_extractions,
    record_runs,
    versions,
)

GOLDEN = json.loads(DIGESTS.read_text())
RUNS = ["whole", *(f"{how}/{each['name']}" for how in ("separate", "batched") for each in EXPERIMENTS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    write_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def exact(folder) -> bool:
    return fingerprint(folder) == GOLDEN["fingerprint"]


@pytest.fixture(scope="module")
def extractions(folder):
    return record_extractions(folder)


@pytest.fixture(scope="module")
def runs(folder, extractions):
    return record_runs(folder)


@pytest.fixture(autouse=True)
def mode(exact, record_property):
    """Record how results are compared; tests/conftest.py prints it at the end."""
    how = "bit by bit" if exact else "within a tolerance, because arithmetic here differs from the recorded one"
    record_property("golden", how)


@pytest.mark.parametrize("codec", [*CODECS, "grown"])
def test_a_cache_has_the_bytes_that_were_recorded(codec, extractions, exact):
    golden, found = GOLDEN["extractions"][codec], extractions[codec]
    assert list(found) == list(golden)
    same = versions()["pyarrow"] == GOLDEN["versions"]["pyarrow"]
    wrong = {path: differences(golden[path], found[path], exact=exact, pyarrow=same) for path in golden}
    assert not any(wrong.values()), wrong


def test_a_killed_and_resumed_extraction_has_the_bytes_of_an_uninterrupted_one(extractions):
    assert extractions["killed"] == extractions[KILLED]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_has_the_losses_that_were_recorded(name, runs, exact):
    wrong = differences(GOLDEN["runs"][name], runs[name], exact=exact)
    assert not wrong, {key: (GOLDEN["runs"][name][key], runs[name][key]) for key in wrong}


def test_a_stopped_and_resumed_run_has_the_losses_of_an_uninterrupted_one(runs):
    assert runs["resumed"] == runs["whole"]


def test_a_single_changed_value_is_reported():
    cache = GOLDEN["extractions"]["f16"]
    cache = cache[min(cache)]
    run = GOLDEN["runs"]["whole"]
    for golden, place, shown_when_inexact in (
        (cache, ("files", "shards/000000.tar"), False),
        (cache, ("files", "plans/000.parquet"), False),
        (cache, ("rows",), False),
        (cache, ("layout",), True),
        (cache, ("codec_error", 0), True),
        (run, ("metrics",), False),
        (run, ("layout",), True),
        (run, ("loss", 7), True),
        (run, ("val_loss", 0), True),
    ):
        changed = copy.deepcopy(golden)
        *way, last = place
        inner = changed
        for step in way:
            inner = inner[step]
        inner[last] = inner[last] * 1.001 if isinstance(inner[last], float) else inner[last][::-1]
        name = place[1] if place[0] == "files" else place[0]
        assert differences(golden, golden, exact=True) == differences(golden, golden, exact=False) == []
        assert differences(golden, changed, exact=True) == [name]
        assert differences(golden, changed, exact=True, pyarrow=False) == (
            [] if name == "plans/000.parquet" else [name]
        )
        assert differences(golden, changed, exact=False) == ([name] if shown_when_inexact else [])
