"""Check that a nanochat checkpoint yields the same logits here as in nanochat's own code: float32, random weights.

Reads a checkout of github.com/karpathy/nanochat. Its GPT is initialized as in training, except that weights that start
at zero are drawn at random (a zero would hide differences behind it), saved as its checkpoints are, and loaded with
``nanochat:FOLDER``. Prints the largest difference of any logit, over all positions of rows longer than the short
attention window and over decoding with a cache. The exit status is 1 above 1e-4. No code of nanochat is stored here.

    git clone https://github.com/karpathy/nanochat ../nanochat
    python bench/nanochat.py ../nanochat            # half a minute
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.lms.base import LanguageModel
from train.lms.load import load_lm
from train.lms.nanochat.tokenizers import ByteTokenizer
from train.lms.packing import pack_inputs

BOUND = 1e-4
ROWS, LENGTH = 3, 160  # the short window is 128
CUT = 40  # tokens of each row computed at once; the rest is decoded one token at a time


def their_model(checkout: Path, depth: int) -> Any:
    """Return nanochat's GPT of ``depth`` with random parameters, in float32 on the CPU."""
    os.environ["NANOCHAT_DTYPE"] = "float32"
    sys.path.insert(0, str(checkout))
    from nanochat.gpt import GPT, GPTConfig

    settings = {"sequence_len": 512, "vocab_size": ByteTokenizer.vocab_size, "n_layer": depth}
    heads = {"n_head": depth, "n_kv_head": depth // 2 or 1, "n_embd": 64 * depth}
    gpt = GPT(GPTConfig(**settings, **heads))
    gpt.to_empty(device="cpu")
    torch.manual_seed(0)
    gpt.init_weights()
    with torch.no_grad():
        for parameter in gpt.parameters():
            if parameter.ndim >= 2 and not parameter.any():
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
            elif parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
        gpt.lm_head.weight.normal_(0, gpt.config.n_embd**-0.5)
    return gpt.float().eval()


def save(gpt: Any, folder: Path) -> None:
    """Save ``gpt`` as nanochat's ``checkpoint_manager`` does."""
    torch.save(gpt.state_dict(), folder / "model_000000.pt")
    (folder / "meta_000000.json").write_text(json.dumps({"model_config": asdict(gpt.config)}))


@torch.no_grad()
def our_logits(lm: LanguageModel, ids: Tensor) -> Tensor:
    """Return the logits of all positions at once: [B, T] -> [B, T, V]."""
    rows = ids.tolist()
    layout = pack_inputs(torch.zeros(len(rows), dtype=torch.int64), rows, [[] for _ in rows])
    return lm.logits(lm.hidden(layout, torch.zeros(0, lm.width)))


@torch.no_grad()
def our_cached_logits(lm: Any, ids: Tensor) -> Tensor:
    """Return logits decoded with a cache: [B, T] -> [B, T - CUT + 1, V].

    The first ``CUT`` positions are computed at once, the others one by one.
    """
    cache = lm.gpt.cache(len(ids), ids.shape[1], torch.float32)
    layout = pack_inputs(torch.zeros(len(ids), dtype=torch.int64), ids[:, :CUT].tolist(), [[] for _ in ids])
    hidden = [lm.gpt(layout, torch.zeros(0, lm.width), torch.float32, cache)[:, -1]]
    hidden += [lm.gpt.step(ids[:, t], cache, torch.float32) for t in range(CUT, ids.shape[1])]
    return lm.logits(torch.stack(hidden, 1))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="a checkout of github.com/karpathy/nanochat")
    parser.add_argument("--depth", type=int, default=6)
    args = parser.parse_args()
    if not (args.checkout / "nanochat" / "gpt.py").is_file():
        print(f"error: '{args.checkout}' has no nanochat/gpt.py: expected a checkout of nanochat", file=sys.stderr)
        return 2
    gpt = their_model(args.checkout, args.depth)
    ids = torch.randint(ByteTokenizer.vocab_size, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = gpt(ids).float()
    with tempfile.TemporaryDirectory() as folder:
        save(gpt, Path(folder))
        lm = load_lm(f"nanochat:{folder}", device="cpu", dtype=torch.float32)
    whole = float((our_logits(lm, ids) - theirs).abs().max())
    cached = float((our_cached_logits(lm, ids) - theirs[:, CUT - 1 :]).abs().max())
    commit = subprocess.run(
        ["git", "-C", args.checkout, "log", "-1", "--format=%h of %as"], capture_output=True, text=True, check=False
    ).stdout.strip()
    print(f"nanochat {commit or '(no git)'}, d{args.depth}, {ROWS} rows of {LENGTH} tokens, float32")
    print(f"logits from {float(theirs.min()):.2f} to {float(theirs.max()):.2f}, spread {float(theirs.std()):.3f}")
    print(f"largest difference: {whole:.1e} for all positions at once, {cached:.1e} with a cache (bound {BOUND:g})")
    return int(max(whole, cached) > BOUND)


if __name__ == "__main__":
    sys.exit(main())
