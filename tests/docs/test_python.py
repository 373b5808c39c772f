"""The Python that the README, docs/projectors.md and docs/encoders.md show is run, on a tiny cache."""

from __future__ import annotations

import pytest
import torch
from docs_text import ROOT, blocks
from tiny_cache import make_cache

BLOCKS = [
    pytest.param(block, id=f"{name}-{number}")
    for name in ("README.md", "docs/projectors.md", "docs/encoders.md")
    for number, block in enumerate(blocks((ROOT / name).read_text(encoding="utf-8"), "python"))
]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("docs") / "cache", 8)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_of_python_runs(block, cache):
    found: dict[str, object] = {}
    exec(block.replace('"caches/…"', repr(str(cache))), found)
    if "stream" in found:
        batch = next(iter(found["stream"]))
        assert batch.features.shape[0] == len(batch.keys) > 0
    for name in {"Mine", "MyProjector"} & found.keys():
        soft, mask = found[name](6, 5, 1.0)(torch.ones(2, 4, 6), torch.ones(2, 4, dtype=torch.bool))
        assert soft.shape == (2, 4, 5)
        assert mask.shape == (2, 4)

    if "MyEncoder" in found:
        (features,) = found["MyEncoder"]("cpu", "float32")(torch.zeros(800), [0]).values()
        assert features.shape == (5, 80)


def test_the_pages_show_python():
    assert len(BLOCKS) >= 5
