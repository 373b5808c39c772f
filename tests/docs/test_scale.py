"""The table of docs/scale.md is what ``bench/scale.py`` computes from the slopes that stand above it."""

from __future__ import annotations

import re
from itertools import zip_longest

import pytest
from docs_text import ROOT, blocks
from scripts import load_script

PAGE = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
UNITS = {"M": 1e6, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "PB": 1e15}
UNITS |= {"ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "d": 86400.0, "": 1.0}


@pytest.fixture(scope="module")
def scale():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench"))  # it imports another bench
        return load_script("bench/scale.py")


@pytest.fixture(scope="module")
def slopes() -> dict[str, float]:
    (block,) = [block for block in blocks(PAGE) if block.startswith("plan, CPU us")]
    return {name.strip(): float(value) for name, value in re.findall(r"^(.+?) {2,}(\S+)$", block, re.MULTILINE)}


def amount(text: str) -> float:
    number, _, unit = text.strip().partition(" ")
    return float(number.replace(",", "")) * UNITS[unit]


def test_the_table_follows_from_the_slopes(scale, slopes):
    measured = {key: slopes[name] / factor for name, key, factor in scale.SLOPES}
    assert len(measured) == len(slopes)
    table = PAGE[PAGE.index("| | LibriSpeech-960") :].partition("\n\n")[0].splitlines()
    told = [[cell.strip() for cell in line.strip("|").split("|")] for line in table if not line.startswith("|---")]
    for mine, theirs in zip_longest(scale.table(measured), told):
        assert mine[0] == theirs[0]
        if not mine[0]:
            assert list(mine) == theirs
            continue
        assert [amount(cell) for cell in theirs[1:]] == pytest.approx([amount(cell) for cell in mine[1:]], rel=0.02)


def test_the_walls_follow_from_the_slopes(scale, slopes):
    seconds = scale.SECONDS_AN_UTTERANCE
    said = re.search(r"would hear ([\d,]+) hours in an hour, and\s+whisper-large-v3 ([\d,]+)\.", PAGE)
    for hours, model in zip(said.groups(), (scale.BASE, scale.LARGE), strict=True):
        assert float(hours.replace(",", "")) == pytest.approx(scale.H100 * scale.SHARE / model.flop * seconds, rel=0.02)
    held = {"plan": slopes["plan, bytes of memory an utterance"], "merge": slopes["merge, bytes of memory a row"]}
    walls = re.findall(r"64 GB (?:hold|merge) (\d+) M\s+utterances, ([\d,]+) hours", PAGE)
    assert len(walls) == 2
    for (rows, hours), size in zip(walls, held.values(), strict=True):
        assert float(rows) * 1e6 == pytest.approx(scale.WORKER_MEMORY / size, rel=0.03)
        assert float(hours.replace(",", "")) == pytest.approx(scale.WORKER_MEMORY / size * seconds / 3600, rel=0.02)
