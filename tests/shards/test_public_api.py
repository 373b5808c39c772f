"""The names that user code imports: there from the top, and nothing heavy is loaded before the first use."""

from __future__ import annotations

import subprocess
import sys

import pytest

import earshard
import shards
import train


@pytest.mark.parametrize("package", [earshard, shards, train])
def test_every_public_name_is_there_from_the_top(package):
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nobody'"):
        _ = package.nobody


def test_importing_the_packages_loads_neither_torch_nor_pyarrow():
    code = (
        "import sys, earshard, shards, pipeline, train; print(sorted({'torch', 'pyarrow', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
