from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.config import ExtractConfig
from shards.config.base import Config
from shards.config.fields import groups, names
from train.config.train import TrainConfig


class Small(Config):
    """One of two.

    Attributes:
        told: here
            and on a second line.
    """

    told: str = "x"
    # above, in
    # two lines
    rank: int = Field(default=8, ge=1, le=64)


class Large(Config):
    told: str


class Base(Config):
    inherited: float | None = None  # from the base


class Example(Base):
    choice: Literal["a", "b"] = "a"  # beside
    part: Small = Small()
    either: Annotated[Small | Large, "two"] = Small()
    maybe: Small | None = None  # off
    many: list[Annotated[int, Field(gt=0)]] = Field(default_factory=list)


def test_a_key_is_told_with_its_values_default_and_comment():
    top, *below = groups(Example)
    keys = {key.name: (key.values, key.default, key.about) for key in top.keys}
    assert keys == {
        "inherited": ("number or null", "null", "from the base"),
        "choice": ("a, b", "a", "beside"),
        "maybe": ("null, or a mapping", "null", "off"),
        "many": ("list of integer > 0", "[]", ""),
    }
    assert [(group.prefix, group.model) for group in below] == [
        ("part.", Small),
        ("either.", Small),
        ("either.", Large),
        ("maybe.", Small),
    ]


def test_comments_above_and_lines_of_the_docstring_are_found():
    told, rank = next(group for group in groups(Example) if group.model is Small).keys
    assert (told.about, told.default) == ("here and on a second line.", "x")
    assert (rank.about, rank.values) == ("above, in two lines", "integer, ≥ 1, ≤ 64")


def test_a_key_without_a_default_is_required():
    (told,) = next(group for group in groups(Example) if group.model is Large).keys
    assert told.default == "required"


def test_names_are_those_that_a_word_may_set():
    found = names(TrainConfig)
    assert {"lr", "projector.stack", "projector.routing", "lm.lora.rank", "batch.max_frames"} <= set(found)
    assert "projector" not in found
    assert found == sorted(set(found))
    assert {"source.path", "encoder.layers", "codec"} <= set(names(ExtractConfig))
