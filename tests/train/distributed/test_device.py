from __future__ import annotations

import pytest
import torch

from shards.errors import UserError
from train.distributed.device import choose_device, choose_dtype


def test_auto_is_a_device_that_is_there():
    device = choose_device("auto")
    assert device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_dtype("auto", device) in (torch.float32, torch.bfloat16)


def test_a_named_dtype_is_taken_as_it_is():
    assert choose_dtype("float32", torch.device("cpu")) == torch.float32
    assert choose_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16


@pytest.mark.parametrize("name", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there_is_refused(name):
    with pytest.raises(UserError, match="set device=auto"):
        choose_device(name)
