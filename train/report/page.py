"""The HTML of a report: Jinja2 templates that escape every value, and the small pieces that table cells are made of.

In: a template of ``templates/`` and its values. Out: ``Markup``, the only type that a template does not escape; besides
the templates themselves, only the constants of this module make it. A name that a template asks for and nobody gives is
an error, not an empty string.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from difflib import SequenceMatcher
from functools import cache
from hashlib import sha256
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

NUM_COLORS = 8  # classes c0 … c7 of report.css: categories
NUM_SHADES = 5  # classes s0 … s4: low to high

Row = Sequence[object]  # the cells of a table; strings are escaped

WITH_SMALL = Markup("{} <small>{}</small>")
DIV = Markup("<div>{}</div>")
SPAN = Markup("<span>{}</span>")
KEY = Markup('<span class="key">{}</span>')
NAME = Markup('<span class="name">{}</span>')
PLAYER = Markup('<audio controls preload="metadata" src="{}"></audio>')
DELETED, INSERTED = Markup("<del>{}</del>"), Markup("<ins>{}</ins>")
LINE_BREAK = Markup("<wbr>")


@cache
def environment() -> Environment:
    """The templates, with the style sheet and its hash (the page's Content-Security-Policy admits no other style)."""
    loader = PackageLoader("train.report")
    found = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    style, _, _ = loader.get_source(found, "report.css")
    found.globals |= {"style": Markup(style), "style_hash": b64encode(sha256(style.encode()).digest()).decode()}
    return found


def render(template: str, **values: Any) -> Markup:
    """The template of that name with ``values``, all of them escaped unless they are ``Markup``."""
    return Markup(environment().get_template(template).render(values))


def breakable(name: str) -> Markup:
    """A name that a line can break after its signs, so that a narrow column need not break it within a word."""
    return NAME.format(LINE_BREAK.join(re.split(r"(?<=[-_/=])(?=[^\W_])", name)))


def utterance(key: str, sounds: Mapping[str, str]) -> Markup:
    """An utterance's key, with a player where there is sound."""
    player = PLAYER.format(sounds[key]) if key in sounds else ""
    return DIV.format(KEY.format(key) + player)


def mark_differences(reference: str, hypothesis: str) -> tuple[Markup, Markup]:
    """Both texts, with words of the reference alone inside ``<del>`` and of the hypothesis alone inside ``<ins>``.

    Case and punctuation at the ends of words make no difference, as in the error rates (which also normalise spellings
    and numbers). A hypothesis without a word is a dash.
    """
    texts = reference.split(), hypothesis.split()
    left, right = ([_plain(word) for word in words] for words in texts)
    sides: tuple[list[Markup], list[Markup]] = ([], [])
    for kind, a, b, c, d in SequenceMatcher(None, left, right, autojunk=False).get_opcodes():
        for side, words, change in zip(sides, (texts[0][a:b], texts[1][c:d]), (DELETED, INSERTED), strict=True):
            if words:
                side.append((Markup("{}") if kind == "equal" else change).format(" ".join(words)))
    return Markup(" ").join(sides[0]), Markup(" ").join(sides[1]) or Markup("–")


def _plain(word: str) -> str:
    return "".join(letter for letter in word.casefold() if letter.isalnum()) or word


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as a percentage; a dash where there is none."""
    return "–" if value is None else f"{100 * value:.{digits}f} %"


def format_interval(
    metrics: Mapping[str, Any], name: str, scale: float = 1, digits: int = 2, signed: bool = False
) -> str:
    """``[low, high]`` of a figure's interval; nothing where the evaluation gave none."""
    found = (metrics.get("intervals") or {}).get(name)
    sign = "+" if signed else ""
    return "" if found is None else f"[{scale * found[0]:{sign}.{digits}f}, {scale * found[1]:{sign}.{digits}f}]"


def duration(seconds: float) -> str:
    """Minutes and seconds, or hours and minutes."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min {rest} s"
