"""Under torchrun: how many numbers of a language model's weights each rank keeps, and the nats that it computes.

python -m torch.distributed.run --nproc-per-node 2 tests/helpers/shard_counts.py REFERENCE FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main(reference: str, folder: str) -> None:
    import torch
    import torch.distributed as dist

    from train.config.model import LmConfig
    from train.lms.load import load_lm

    dist.init_process_group("gloo")
    found = {}
    for name, options in {"whole": {}, "divided": {"shard": True, "padding_free": True}}.items():
        lm = load_lm(reference, device="cpu", dtype=torch.float32, options=LmConfig(**options))
        kept: dict[str, int] = {}
        for parameter_name, parameter in lm.named_parameters():
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            part = "layers" if ".layers." in parameter_name else "rest"
            kept[part] = kept.get(part, 0) + local.untyped_storage().nbytes() // 4
        soft = torch.ones(2, 3, lm.width, requires_grad=True)
        nats = lm.target_nll(soft, torch.ones(2, 3, dtype=torch.bool), [[5], []], [[], [6]], [[7, 2], [2]])
        nats.sum().backward()
        assert soft.grad is not None
        found[name] = {"kept": kept, "nats": nats.tolist(), "grad": soft.grad.flatten().tolist()}
    Path(folder, os.environ["RANK"]).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
