from __future__ import annotations

import pytest
from pydantic import Field

from shards.config.base import Config, load_config
from shards.errors import UserError


class Source(Config):
    path: str | None = None
    splits: tuple[str, ...] = ()
    limit: int | None = Field(default=None, ge=1)


class Settings(Config):
    lr: float = 1e-4
    name: str = "run"
    flag: bool = False
    source: Source = Source()
    caches: tuple[Source, ...] = ()


@pytest.fixture
def file(tmp_path):
    def write(text: str | bytes):
        path = tmp_path / "config.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def test_words_override_the_file_in_order(file):
    path = file("lr: 0.5\nsource: {limit: 3}\n")
    settings = load_config(Settings, path, ["lr=0.25", "source.splits=[dev-clean, test-clean]", "lr=2"])
    assert settings == Settings(lr=2, source=Source(limit=3, splits=("dev-clean", "test-clean")))


def test_a_number_that_yaml_reads_as_text_is_a_number(file):
    assert load_config(Settings, file("lr: 1e-3")).lr == 0.001
    assert load_config(Settings, None, ["lr=1e-3"]).lr == 0.001


def test_an_empty_file_is_the_defaults(file):
    assert load_config(Settings, file("# nothing\n")) == Settings()


def test_a_value_may_hold_an_equals_sign():
    assert load_config(Settings, None, ["name=a=b"]).name == "a=b"


def test_an_override_below_an_empty_key_fills_it(file):
    assert load_config(Settings, file("source:\n"), ["source.limit=2"]).source.limit == 2


def test_validated_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_config(Settings, None).lr = 3


@pytest.mark.parametrize(
    ("text", "words", "told"),
    [
        ("lrr: 1", [], "unknown key 'lrr' in '.*config.yaml'; allowed here: caches, flag, lr, name, source$"),
        ("source: {pth: x}", [], "unknown key 'source.pth' .*; allowed here: limit, path, splits$"),
        ("caches: [{pth: x}]", [], "unknown key 'caches.0.pth' .*; allowed here: limit, path, splits$"),
        ("", ["source.pth=x"], "unknown key 'source.pth' in 'source.pth=x' on the command line; allowed here: limit"),
        ("lr: fast", [], "key 'lr' in '.*config.yaml' is 'fast': input should be a valid number"),
        ("", ["source.limit=0"], "key 'source.limit' in 'source.limit=0' on the command line is 0: "),
        ("lr: a\nname: [1]", [], r"\(and 1 more\)$"),
        ("caches: [{limit: 0}]\nsource: {pth: x}", [], "^unknown key 'source.pth'"),
        ("", ["lr"], "'lr' is not an override: write it as key=value"),
        ("", ["=3"], "'=3' is not an override"),
        ("", ["lr=[1"], "the value of 'lr' on the command line is not YAML"),
        ("", ["name=2024-13-45"], "the value of 'name' on the command line is not YAML: month must be in 1..12"),
        ("name: 2024-13-45", [], "is not YAML: month must be in 1..12"),
        ("name: [" * 3000, [], "is not YAML"),
        ("", ["name.x.y=1", "name.x.y.z=1"], "sets a key below 'y', which holds 1 and not a mapping"),
        ("a: [", [], "'.*config.yaml' is not YAML"),
        ("- a\n- b", [], "holds a list, not a mapping of keys"),
        (b"\xff\xfe\xff", [], "cannot read the configuration file"),
        ("? [a, b]\n: 1", [], "is not YAML"),
        ("1: 2", [], "config.yaml"),
        ("a: &a [*a]", [], "unknown key 'a'"),
        ("!!python/object/apply:os.system [id]", [], "is not YAML"),
    ],
)
def test_what_is_wrong_is_told_with_its_key_and_place(file, text, words, told):
    with pytest.raises(UserError, match=told):
        load_config(Settings, file(text), words)


def test_a_file_that_is_not_there_is_told_with_where_examples_stand(tmp_path):
    with pytest.raises(UserError, match=r"no configuration file at .*configs/"):
        load_config(Settings, tmp_path / "no.yaml")
    with pytest.raises(UserError, match="cannot read the configuration file"):
        load_config(Settings, tmp_path)
