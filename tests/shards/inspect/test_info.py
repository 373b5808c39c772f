"""What ``info`` says about a cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tiny_cache import grow, make_cache
from tiny_faults import make_small_cache, reseal
from tiny_server import serve

from shards.__main__ import main
from shards.errors import UserError
from shards.format.layout import Layout
from shards.format.records import unseal
from shards.inspect.info import describe_cache, format_info


@pytest.fixture
def cache(tmp_path) -> Path:
    return make_small_cache(tmp_path / "cache", "int8")


def lines(about: dict) -> str:
    return "\n".join(format_info(about))


def test_generations_and_label_sets_are_described_at_a_path_and_at_a_url(cache, capsys):
    reseal(
        Layout(cache).cache, lambda tree: tree["generations"][1]["provenance"].update(finished="2030-01-02T03:04:05Z")
    )
    about = describe_cache(cache)
    assert (about["complete"], about["generation"], about["unfinished"]) == (True, 1, None)
    assert [(part["number"], part["rows"], part["shards"]) for part in about["generations"]] == [(0, 4, 2), (1, 2, 1)]
    assert [(entry["name"], entry["rows"], entry["current"]) for entry in about["labels"]] == [
        ("source", 6, False),
        ("source", 8, True),
        ("mine", 8, True),
    ]
    text = lines(about)
    assert "6 of 9 planned, 3 failed, 1 superseded, in 3 shards" in text
    assert "generation 1  2 utterances in 1 shards, finished 2030-01-02T03:04:05Z" in text
    assert f"mine {about['labels'][-1]['id'][:8]}, 8 rows" in text
    with serve(cache) as server:
        assert describe_cache(server.url) == {**about, "path": server.url}
        assert not [name for name, _ in server.asked if name.endswith((".tar", ".parquet"))]
    main(["info", str(cache), "--json"])
    assert json.loads(capsys.readouterr().out) == about


def test_the_codec_error_is_that_of_all_utterances_and_times_are_added(cache):
    info = unseal(Layout(cache).cache)
    parts = [entry["codec_error"] for entry in info["generations"]]
    reseal(Layout(cache).cache, lambda tree: [entry.update(seconds=1.5) for entry in tree["generations"]])
    about = describe_cache(cache)
    assert about["codec_error"]["mean"] == pytest.approx((4 * parts[0]["mean"] + 2 * parts[1]["mean"]) / 6)
    assert about["codec_error"]["max"] == max(part["max"] for part in parts) > 0
    assert about["seconds"] == 3.0


@pytest.mark.parametrize("remote", [False, True])
def test_an_unfinished_generation_is_told_with_what_finishes_it(tmp_path, remote):
    cache = make_cache(tmp_path / "cache", n=4, shards=2)
    before = Layout(cache).cache.read_bytes()
    grow(cache, n=7, shards=7)
    layout = Layout(cache)
    layout.cache.write_bytes(before)
    for shard in range(5, 9):
        layout.record(shard).unlink()
    shutil.copy(layout.record(0), layout.record(8))  # of another plan: not committed
    with serve(cache) as server:
        about = describe_cache(server.url if remote else cache)
    assert (about["complete"], about["counts"]["shards"], about["unfinished"]["planned"]) == (True, 2, 7)
    assert "generation 1 is unfinished: 3 of 7 shards committed; rerun the extraction" in lines(about)
    layout.cache.unlink()
    about = describe_cache(cache)
    assert (about["complete"], about["unfinished"]["generation"]) == (False, 1)
    assert "not complete: 5 of 9 shards committed" in lines(about)


def test_what_cannot_be_described_is_reported_in_a_sentence(cache, tmp_path):
    layout = Layout(cache)
    with pytest.raises(UserError, match=r"is not a cache: it has neither CACHE\.json nor plans"):
        describe_cache(tmp_path / "nothing")
    reseal(layout.cache, lambda tree: tree["generations"][0].pop("codec_error"))
    with pytest.raises(UserError, match=r"CACHE.json' has missing or invalid fields \('codec_error'\): run .* verify"):
        describe_cache(cache)
    reseal(layout.cache, lambda tree: tree["spec"].update(schema_version=1))
    with pytest.raises(UserError, match="has cache format 1, this earshard reads 2: extract again with `make extract`"):
        describe_cache(cache)


def test_a_stranger_cannot_control_the_terminal(cache):
    evil = {"source": {"name": "x\x1b[2J"}, "finished": "\x1b[31m"}
    reseal(Layout(cache).cache, lambda tree: [entry.update(provenance=evil) for entry in tree["generations"]])
    assert "\x1b" not in lines(describe_cache(cache))


@pytest.mark.parametrize("name", ["planned", "utterances", "failures", "frames", "samples", "bytes"])
@pytest.mark.parametrize("value", [0, 10**15])
def test_counts_that_lie_are_refused_with_both_figures(cache, capsys, name, value):
    found = unseal(Layout(cache).cache)["generations"][0]["counts"][name]
    assert found

    def lie(tree):
        for counts in (tree["generations"][0]["counts"], tree["counts"]):
            counts[name] += value - found

    reseal(Layout(cache).cache, lie)
    with pytest.raises(
        UserError, match=rf"\({value} {name} in generation 0, found {found}\): run `python -m shards verify"
    ):
        describe_cache(cache)


@pytest.mark.parametrize("change", [{"frames": 7}, {"superseded": 10**9}, {"superseded": -1}])
def test_totals_that_are_not_the_sum_of_the_generations_are_refused_at_a_path_and_at_a_url(cache, change):
    reseal(Layout(cache).cache, lambda tree: tree["counts"].update(change))
    with serve(cache) as server:
        for place in (cache, server.url):
            with pytest.raises(UserError, match=rf"{next(iter(change.values()))} (frames, the gen|superseded rows)"):
                describe_cache(place)


def test_a_missing_tar_or_table_is_named(cache):
    for path in (Layout(cache).tar(1), Layout(cache).manifest(0)):
        path.unlink()
        with pytest.raises(UserError, match=rf"{path.name}.*: run `python -m shards verify"):
            describe_cache(cache)
