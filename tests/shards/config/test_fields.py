from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from pipeline.config import ExtractConfig
from shards.config.base import Config
from shards.config.fields import groups, names, old_names, rename_key, submodels
from train.config.train import TrainConfig
from train.sweeps.config import SweepConfig


class Small(Config):
    """One of two."""

    told: str = "x"
    """On one line,
    and on a second."""
    rank: int = Field(default=8, ge=1, le=64)
    """Bounded."""


class Large(Config):
    told: str
    """Needed."""


class Base(Config):
    inherited: float | None = None
    """From the base."""


class Example(Base):
    choice: Literal["a", "b"] = "a"
    """One of two."""
    part: Small = Small()
    either: Annotated[Small | Large, "two"] = Small()
    maybe: Small | None = None
    """Off."""
    many: list[Annotated[int, Field(gt=0)]] = Field(default_factory=list)


def test_a_key_is_reported_with_its_values_default_and_docstring():
    top, *below = groups(Example)
    keys = {key.name: (key.values, key.default, key.about) for key in top.keys}
    assert keys == {
        "inherited": ("number or null", "null", "From the base."),
        "choice": ("a, b", "a", "One of two."),
        "maybe": ("null, or a mapping", "null", "Off."),
        "many": ("list of integer > 0", "[]", ""),
    }
    assert [(group.prefix, group.model) for group in below] == [
        ("part.", Small),
        ("either.", Small),
        ("either.", Large),
        ("maybe.", Small),
    ]


def test_a_docstring_of_several_lines_is_one_line():
    told, rank = next(group for group in groups(Example) if group.model is Small).keys
    assert (told.about, told.default) == ("On one line, and on a second.", "x")
    assert (rank.about, rank.values) == ("Bounded.", "integer, ≥ 1, ≤ 64")


def test_a_key_without_a_default_is_required():
    (told,) = next(group for group in groups(Example) if group.model is Large).keys
    assert told.default == "required"


def test_names_are_those_that_an_argument_may_set():
    found = names(TrainConfig)
    assert {"lr", "projector.stack", "projector.routing", "lm.lora.rank", "batch.max_frames"} <= set(found)
    assert "projector" not in found
    assert found == sorted(set(found))
    assert {"source.path", "encoder.layers", "codec"} <= set(names(ExtractConfig))


def test_a_dotted_key_is_renamed_at_every_level_with_its_value():
    assert rename_key(TrainConfig, "lm.lora.targets", ["x"]) == ("lm.lora.target_modules", ["x"])
    assert rename_key(TrainConfig, "lm", {"checkpointing": True}) == ("lm", {"gradient_checkpointing": True})
    assert rename_key(TrainConfig, "projector.jitter", 0.1) == ("projector.router_jitter_noise", 0.1)
    assert rename_key(SweepConfig, "base.clip", 2) == ("base.max_grad_norm", 2)
    assert rename_key(TrainConfig, "no.such.key", 1) == ("no.such.key", 1)


def test_every_old_name_maps_to_a_key_and_is_no_key_itself():
    def check(model: type[BaseModel]) -> int:
        old = old_names(model)
        assert set(old.values()) <= set(model.model_fields)
        assert not set(old) & set(model.model_fields)
        return len(old)

    models = {each for top in (ExtractConfig, TrainConfig, SweepConfig) for _, each in submodels(top)}
    assert sum(map(check, models)) >= 20
