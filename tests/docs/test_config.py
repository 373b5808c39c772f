"""docs/config.md is what the code says today."""

from __future__ import annotations

import pytest
from scripts import load_script

from shards.config.fields import groups


@pytest.fixture(scope="module")
def script():
    return load_script("docs/make_config.py")


def test_the_page_is_up_to_date(script):
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), "docs/config.md is old: run `make docs`"


def test_every_key_is_explained(script):
    keys = [key for _, _, model in script.PARTS for group in groups(model) for key in group.keys]
    unexplained = {key.name for key in keys if not key.about}
    assert unexplained <= {"projector.kind"}, "write a string below each field of the configuration"
