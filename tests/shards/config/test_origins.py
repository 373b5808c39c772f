from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline.config import ExtractConfig
from shards.config.base import Config, load_config
from shards.config.origins import render, summary
from train.config.train import TrainConfig

CONFIGS = Path(__file__).resolve().parent.parent.parent.parent / "configs"
MODELS = {"extract": ExtractConfig, "train": TrainConfig}
FILES = sorted(file for folder in MODELS for file in (CONFIGS / folder).glob("*.yaml"))


class Inner(Config):
    rank: int = 8
    names: tuple[str, ...] = ("a: b",)


class Settings(Config):
    lr: float = 1e-4
    title: str = "plain"
    inner: Inner = Inner()
    maybe: Inner | None = None


def places(text: str) -> dict[str, str]:
    """``indented key: value`` -> its comment; the comment starts at the last two spaces and a hash."""
    return {left.split(":")[0]: right for left, _, right in (line.rpartition("  # ") for line in text.splitlines())}


def printed(path, words) -> str:
    return render(load_config(Settings, path, words), path, words)


@pytest.fixture
def file(tmp_path):
    def write(text: str):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return path

    return write


def test_each_value_is_told_with_its_file_and_line_or_the_command_line_or_as_the_default(file):
    path = file("# a comment\nlr: 1e-3\ninner:\n  rank: 4\n")
    found = places(printed(path, ["title=mine"]))
    assert found["lr"] == f"{path}:2"
    assert found["  rank"] == f"{path}:4"
    assert found["  names"] == "default"
    assert found["title"] == "command line"
    assert found["maybe"] == "default"


def test_a_word_that_sets_a_mapping_hides_the_lines_below_it(file):
    found = places(printed(file("inner: {rank: 4, names: [x]}\n"), ["inner={rank: 5}"]))
    assert found["  rank"] == "command line"
    assert found["  names"] == "default"


def test_a_word_below_an_empty_key_of_the_file_counts(file):
    found = places(printed(file("maybe:\n"), ["maybe.rank=3"]))
    assert found["  rank"] == "command line"


def test_a_merged_mapping_is_told_by_the_line_it_was_written_on(file):
    path = file("maybe: &both\n  rank: 4\ninner:\n  <<: *both\n  names: [z]\n")
    assert printed(path, []).count(f"  # {path}:2\n") == 2


def test_what_is_printed_loads_to_the_same_settings(file, tmp_path):
    words = ["title=a # b: c", "inner.names=['x, y', '#']", "maybe.rank=1"]
    again = tmp_path / "again.yaml"
    again.write_text(printed(file("lr: 0.5\n"), words))
    assert load_config(Settings, again) == load_config(Settings, file("lr: 0.5\n"), words)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_print_of_every_configuration_of_this_repository_is_that_configuration(path, tmp_path):
    model = MODELS[path.parent.name]
    config = load_config(model, path)
    (tmp_path / "again.yaml").write_text(render(config, path, []))
    assert load_config(model, tmp_path / "again.yaml") == config


def test_the_summary_counts_where_keys_come_from(file):
    path = file("lr: 1\n")
    config = load_config(Settings, path, ["inner.rank=2"])
    assert summary(config, path, ["inner.rank=2"]) == (
        f"{path} sets 1 keys, the command line 1, 3 are at their defaults"
    )
    assert yaml.safe_load(render(config, path, ["inner.rank=2"]))["inner"]["rank"] == 2
