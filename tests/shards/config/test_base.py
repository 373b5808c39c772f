from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import Discriminator, Field, Tag

from shards.config.base import Config, load_config, validate_config
from shards.errors import UserError


class Source(Config):
    OLD_NAMES: ClassVar[Mapping[str, str]] = {"max": "limit"}

    path: str | None = None
    splits: tuple[str, ...] = ()
    limit: int | None = Field(default=None, ge=1)


class Mlp(Config):
    kind: Literal["mlp"] = "mlp"
    hidden: int = 8
    pool: int = 1


class Pool(Config):
    kind: Literal["pool"] = "pool"
    pool: int = 2


Kind = Annotated[
    Annotated[Mlp, Tag("mlp")] | Annotated[Pool, Tag("pool")],
    Discriminator(lambda value: value.get("kind", "mlp") if isinstance(value, dict) else value.kind),
]


class Settings(Config):
    OLD_NAMES: ClassVar[Mapping[str, str]] = {"clip": "max_grad_norm"}

    lr: float = 1e-4
    name: str = "run"
    flag: bool = False
    max_grad_norm: float = 1.0
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    model: str | list[str] | None = None
    source: Source = Source()
    caches: tuple[Source, ...] = ()
    projector: Kind = Mlp()


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
        ("flag: true\nlrr: 1", [], "^unknown key 'lrr' in .*config.yaml:2: did you mean 'lr'\\?$"),
        ("zzz: 1", [], "^unknown key 'zzz' in .*config.yaml:1: allowed here: lr, name, flag, .*, projector$"),
        ("source:\n  pth: x", [], "unknown key 'source.pth' in .*config.yaml:2: did you mean 'source.path'"),
        (
            "caches:\n- {}\n- {pth: x}",
            [],
            "unknown key 'caches.1.pth' in .*config.yaml:3: did you mean 'caches.1.path'",
        ),
        ("source: {}", ["source.pth=x"], "unknown key 'source.pth' in the argument 'source.pth=x': did you mean"),
        ("source: {path: y}", ["source={pth: x}"], "unknown key 'source.pth' in the argument 'source={pth: x}'"),
        ("source: {pth: y}", ["source.path=x"], "unknown key 'source.pth' in .*config.yaml:1: "),
        ("limit: 1", [], "did you mean 'source.limit'"),  # the same name elsewhere
        ("clp: 1", [], "did you mean 'max_grad_norm'"),  # near an old name
        ("", ["projector.hiden=3"], "unknown key 'projector.hiden' in .*: did you mean 'projector.hidden'"),
        ("projector:\n  kind: pool\n  hidden: 3", [], "'projector.hidden' in .*:3: allowed here: kind, pool; to drop"),
        ("projector: {kind: pol}", [], "key 'projector.kind' in .*:1 is 'pol': expected .*; did you mean 'pool'"),
        ("projector: {kind: pool, pool: x}", [], "key 'projector.pool' in .*:1 is 'x': "),
        ("lr: 1\nschedule: cosin", [], "'schedule' in .*:2 is 'cosin': expected 'cosine', .*; did you mean 'cosine'"),
        (
            "",
            ["schedule=3"],
            "'schedule' in the argument 'schedule=3' is 3: expected 'cosine', 'linear' or 'constant'$",
        ),
        ("model: {}", [], "^key 'model' in .*config.yaml:1 is {}: "),
        ("lr: fast", [], "key 'lr' in .*config.yaml:1 is 'fast': input should be a valid number"),
        ("clip: fast", [], "key 'max_grad_norm' in .*config.yaml:1 is 'fast'"),
        ("", ["clip=fast"], "key 'max_grad_norm' in the argument 'clip=fast' is 'fast'"),
        ("", ["source.limit=0"], "key 'source.limit' in the argument 'source.limit=0' is 0: "),
        ("lr: a\nname: [1]", [], r"\(and 1 more\)$"),
        (
            "clip: 1\nmax_grad_norm: 1",
            [],
            "config.yaml' is not .*: 'clip' is the old name of 'max_grad_norm', and both",
        ),
        ("source: {limit: 1, max: 1}", [], "'max' is the old name of 'limit', and both are set: remove 'max'$"),
        ("", ["clip=1", "max_grad_norm=1"], "set 'clip' and 'max_grad_norm', which name the same key: set only 'max_"),
        ("", ["source={limit: 1, max: 1}"], "the argument 'source=.*: 'max' is the old name of 'limit'"),
        ("caches: [{limit: 0}]\nsource: {pth: x}", [], "^unknown key 'source.pth'"),
        ("", ["lr"], "'lr' is not an override: write it as key=value"),
        ("", ["=3"], "'=3' is not an override"),
        ("", ["lr=[1"], "the value of the argument 'lr=.1' is not valid: expected ',' or ']'"),
        ("", ["name=2024-13-45"], "the argument 'name=2024-13-45' is not valid: month must be in 1..12"),
        ("name: 2024-13-45", [], "is not a valid configuration: month must be in 1..12"),
        ("name: [" * 3000, [], "is not a valid configuration"),
        ("", ["name.x.y=1", "name.x.y.z=1"], "sets a key below 'y': expected a mapping there, got 1"),
        ("a: [", [], "'.*config.yaml' is not a valid configuration: .* at line 1, column 5"),
        ("- a\n- b", [], "expected a mapping, got list"),
        (b"\xff\xfe\xff", [], "cannot read the configuration file"),
        ("? [a, b]\n: 1", [], "is not a valid configuration"),
        ("1: 2", [], "config.yaml"),
        ("lr: 1\na: &a [x]", [], "anchors and aliases are not supported, .* at line 2, column 4$"),
        ("a: *a", [], "anchors and aliases are not supported"),
        ("", ["name=&a x"], "anchors and aliases are not supported"),
        ("!!python/object/apply:os.system [id]", [], "is not a valid configuration"),
    ],
)
def test_what_is_wrong_is_reported_with_its_key_and_place(file, text, words, told):
    with pytest.raises(UserError, match=told):
        load_config(Settings, file(text), words)


def test_a_file_that_is_not_there_is_reported_with_where_examples_are(tmp_path):
    with pytest.raises(UserError, match=r"configuration file .* does not exist: .*configs/"):
        load_config(Settings, tmp_path / "no.yaml")
    with pytest.raises(UserError, match="cannot read the configuration file"):
        load_config(Settings, tmp_path)


def test_old_names_of_keys_are_accepted_and_the_present_ones_written(file):
    path = file("clip: 2\nsource: {max: 3}\n")
    assert load_config(Settings, path) == Settings(max_grad_norm=2, source=Source(limit=3))
    assert load_config(Settings, None, ["clip=2", "source.max=3"]) == load_config(Settings, path)
    assert validate_config(Settings, {"clip": 2, "source": {"max": 3}}, "here") == load_config(Settings, path)
    assert Settings(clip=2).model_dump()["max_grad_norm"] == 2
    assert "clip" not in Settings(clip=2).model_dump()


def test_the_new_name_of_a_key_overrides_the_old_one_in_the_file_and_the_other_way_round(file):
    old, new = file("clip: 2\nsource: {max: 3}\n"), ["max_grad_norm=4", "source.limit=5"]
    assert load_config(Settings, old, new) == Settings(max_grad_norm=4, source=Source(limit=5))
    assert load_config(Settings, file("max_grad_norm: 2\n"), ["clip=4"]).max_grad_norm == 4


def test_an_error_of_a_mapping_in_memory_names_where_it_is_from():
    with pytest.raises(UserError, match="unknown key 'lrr' in the record: did you mean 'lr'"):
        validate_config(Settings, {"lrr": 1}, "the record")
    with pytest.raises(UserError, match="'clip' is the old name"):
        validate_config(Settings, {"clip": 1, "max_grad_norm": 1}, "the record")


def test_a_file_larger_than_any_configuration_is_refused_before_it_is_parsed(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("x: [" + "1, " * 400_000 + "]")
    with pytest.raises(UserError, match="is larger than 1 MiB, which no configuration is"):
        load_config(Settings, path)
