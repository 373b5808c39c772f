"""Record the digests of caches and training runs, byte for byte and loss for loss, in ``digests.json``.

    python tests/golden/regenerate.py            (make golden)

Run it only after a change that is meant to change these numbers, and give the reason in the commit message.
``test_golden.py`` repeats the same extractions and runs and compares the results. Everything runs through the public
commands in separate processes, so moving or rewriting modules does not affect it. A digest is the first 16 hexadecimal
digits of a sha256.

Arithmetic is pinned to code paths that every x86-64 CPU has (``ARITHMETIC``), and its fingerprint is recorded. If
the fingerprint differs (another torch, another architecture), floating-point results cannot be compared bit by bit.
Then ``differences`` compares everything that does not depend on arithmetic, and the losses within a tolerance.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from inputs import write_inputs
from safetensors.numpy import load_file

ROOT = Path(__file__).resolve().parents[2]
DIGESTS = Path(__file__).with_name("digests.json")

ARITHMETIC = {  # one thread, and the code paths that every x86-64 CPU has
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OPENBLAS_CORETYPE": "Nehalem",
    "NPY_DISABLE_CPU_FEATURES": " ".join(np.show_config(mode="dicts")["SIMD Extensions"].get("found", [])),
}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": ""}

# Removed from JSON files before they are hashed: times, paths, the machine, versions, messages for people, and the seal
# that covers them.
PROVENANCE = (
    "config",
    "cpus",
    "earshard",
    "finished",
    "last_run_seconds",
    "machine",
    "python",
    "torch",
    "transformers",
)
VOLATILE = {
    "sha256",
    "timings",
    "failures.error",
    "sets.made",
    "sets.from",
    "generations.seconds",
    "generations.encode_seconds",
    "generations.files.failures",  # its rows are hashed without the messages
    *(f"generations.provenance.{name}" for name in (*PROVENANCE, "source.problems", "source.root")),
}
# Depends on arithmetic or on the version of pyarrow: not part of the layout, which is compared on every machine.
COMPUTED = {
    "plan_id",
    "tar.sha256",
    "parquet",
    "sets.file",
    *(f"generations.{name}" for name in ("plan_id", "manifest_id", "codec_error", "files")),
}
COMPUTED_COLUMNS = {"crc32", "error"}
TIMES = {"seconds", "data_wait", "eval_seconds", "elapsed"}  # of metrics.jsonl and evaluations.jsonl
MESSAGES = {"silence"}  # of evaluations.jsonl

CODECS = ("f16", "bf16", "int8", "fp8")
KILLED = "int8"  # also extracted with a kill halfway; its corpus includes a recording that cannot be decoded
STEPS = 20
RUN = {
    "lm": {"model": "path:lm"},
    "device": "cpu",
    "dtype": "float32",
    "steps": STEPS,
    "lr": 0.01,
    "weight_decay": 0.01,
    "batch": {"size": 3, "window_shards": 2},
    "projector": {"kind": "mlp", "stack": 4, "norm": "rms"},
    "eval_every": 8,
    "eval_batch": 4,
    "decode_limit": 2,
    "decode_samples": 1,
    "max_new_tokens": 4,
    "checkpoint_every": 7,
}
FIT = {
    **RUN,
    "accumulate": 2,
    "clip": 0.5,
    "mask_frames": 0.1,
    "noise": 0.05,
    "ema": 0.9,
    "contrastive": {"weight": 0.1},
    "prompt": {"template": "chat"},
}
SWEEP = {**RUN, "accumulate": 2, "data_seed": 0}  # one order of the data, so the experiments form one group
EXPERIMENTS = [
    {"name": "mlp"},
    {"name": "qformer", "projector": {"kind": "qformer", "window": 15, "layers": 1, "hidden": 32, "dropout": 0.2}},
    {"name": "pool", "projector": {"kind": "pool", "pool": 5}, "lr": 0.02, "seed": 3, "ema": 0.5},
]
FLOATS = ("loss", "grad_norm")  # of a step: recorded, to be compared within the tolerance
TOLERANCE = 1e-4  # relative

# Runs a module as `python -m` does. Just before a file is renamed to a path that matches the pattern, the process sends
# itself the signal, once.
STOPPER = """
import os, re, runpy, sys
pattern, number, module = sys.argv[1:4]
fits = []
def watch(event, args):
    if event in ("os.rename", "os.link") and not fits and re.search(pattern, os.fsdecode(args[1])):
        fits.append(1)
        os.kill(os.getpid(), int(number))
sys.addaudithook(watch)
sys.argv[:] = [module, *sys.argv[4:]]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""

FINGERPRINT = """
import hashlib, math
import numpy as np, soxr, torch
import torch.nn.functional as F
torch.manual_seed(0)
a, b, w = torch.randn(70, 65), torch.randn(65, 96), torch.randn(16, 8, 3)
q = torch.randn(1, 2, 50, 16, requires_grad=True)
out = F.scaled_dot_product_attention(q, q, q, is_causal=True)
out.square().mean().backward()
x = np.random.RandomState(0).standard_normal(4000).astype(np.float32)
results = [
    a @ b, F.conv1d(torch.randn(2, 8, 100), w, stride=2), F.softmax(a, -1), a.exp(), a.abs().log10(), a.cos(),
    F.gelu(a), F.silu(a), a.sigmoid(), a.rsqrt().nan_to_num(), F.layer_norm(a, (65,)), F.rms_norm(a, (65,)),
    a.sum(), a.norm(), F.cross_entropy(a, torch.arange(70) % 65), torch.logsumexp(a, -1),
    F.dropout(a, 0.3), out, q.grad,
    torch.stft(torch.from_numpy(x), 400, 160, window=torch.hann_window(400), return_complex=True).abs().square(),
    np.exp(x), np.sin(x), x.reshape(40, 100) @ x.reshape(100, 40), soxr.resample(x, 8000, 16000, quality="HQ"),
    np.sqrt(np.square(x).sum(dtype=np.float64)), np.float64(math.cos(0.3) + math.exp(0.7)),
]
digest = hashlib.sha256(torch.__version__.encode())
for result in results:
    digest.update(np.asarray(torch.as_tensor(result).detach()).tobytes())
print(digest.hexdigest()[:16])
"""


# run ------------------------------------------------------------------------------------------------------------------


def run(folder: Path, *words: str, expect: int = 0) -> str:
    """Run ``python words`` in ``folder`` and return its standard output; RuntimeError for another exit status."""
    env = {**os.environ, **ARITHMETIC, **OFFLINE, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=600
    )
    if done.returncode != expect:
        output = f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        raise RuntimeError(f"{' '.join(words)[-500:]}\nexit status {done.returncode}, expected {expect}:\n{output}")
    return done.stdout


def fingerprint(folder: Path) -> str:
    """Return a digest of torch's version and of small results computed as in the runs."""
    return run(folder, "-c", FINGERPRINT).strip()


def extraction(codec: str, root: str) -> list[str]:
    """Return arguments of ``python -m`` that extract two layers of the corpus into about three shards each."""
    corpus = "broken" if codec == KILLED else "clips"
    return [
        "pipeline",
        "extract",
        f"root={root}",
        "source.kind=manifest",
        f"source.path=corpus/{corpus}.csv",
        "encoder.model=path:whisper",
        "encoder.dtype=float32",
        "encoder.device=cpu",
        "encoder.layers=[1,2]",
        f"codec={codec}",
        "shard_mb=0.07" if codec in ("f16", "bf16") else "shard_mb=0.045",
        "max_failures=1",
    ]


def stopped(folder: Path, pattern: str, number: signal.Signals, *words: str, expect: int) -> None:
    """Run ``python -m words``; it gets the signal just before it renames a file to a path that matches ``pattern``."""
    run(folder, "-c", STOPPER, pattern, str(int(number)), *words, expect=expect)


def caches(folder: Path, root: str) -> list[str]:
    """Return the caches below ``root``, by their paths relative to ``folder``."""
    return sorted(str(path.parent.relative_to(folder)) for path in (folder / root).glob("[!.]*/*/plans"))


def record_extractions(folder: Path) -> dict[str, Any]:
    """Extract with every codec, and once more killed halfway and resumed; the records of the caches, by codec."""
    found = {}
    for codec in CODECS:
        run(folder, "-m", *extraction(codec, root=codec))
        found[codec] = {path.split("/", 1)[1]: record_cache(folder / path) for path in caches(folder, codec)}
    words = extraction(KILLED, root="killed")
    stopped(folder, r"/shards/000001\.json$", signal.SIGKILL, *words, expect=-signal.SIGKILL)
    halves = [folder / path for path in caches(folder, "killed")]
    assert not any((cache / "CACHE.json").exists() for cache in halves)
    assert any((cache / "shards" / "000000.json").exists() for cache in halves)
    assert not all((cache / "shards" / "000001.json").exists() for cache in halves)
    run(folder, "-m", *words)
    found["killed"] = {path.split("/", 1)[1]: record_cache(folder / path) for path in caches(folder, "killed")}
    for more in (["limit=5"], []):
        run(folder, "-m", *extraction("f16", root="grown"), *more)
    found["grown"] = {path.split("/", 1)[1]: record_cache(folder / path) for path in caches(folder, "grown")}
    return found


def record_runs(folder: Path) -> dict[str, Any]:
    """A run, the same run stopped and resumed, and two sweeps over the caches of ``record_extractions``, by name."""
    layers, killed = caches(folder, "f16"), caches(folder, "killed")
    fit = ["train", "fit", f"caches={json.dumps([layers])}", *(f"{key}={json.dumps(FIT[key])}" for key in FIT)]
    run(folder, "-m", *fit, "name=whole")
    stopped(folder, r"/checkpoints/step-0*7\b", signal.SIGTERM, *fit, "name=resumed", expect=130)
    assert len(lines(folder / "runs/resumed/metrics.jsonl")) < STEPS
    run(folder, "-m", "train", "fit", "--resume", "runs/resumed")
    found = {name: record_run(folder / "runs" / name) for name in ("whole", "resumed")}
    for lockstep in ("separate", "batched"):
        sweep = {"base": {**SWEEP, "caches": [killed[1]]}, "list": EXPERIMENTS, "name": lockstep, "lockstep": lockstep}
        (folder / f"{lockstep}.yaml").write_text(json.dumps(sweep))
        run(folder, "-m", "train", "sweep", "--config", f"{lockstep}.yaml", "engine=local")
        for experiment in EXPERIMENTS:
            name = f"{lockstep}/{experiment['name']}"
            found[name] = record_run(folder / "runs" / name)
    return found


# record ---------------------------------------------------------------------------------------------------------------


def digest(data: bytes | Any) -> str:
    """Return 16 digits of the sha256 of bytes, or of a tree as JSON with sorted keys."""
    if not isinstance(data, bytes):
        text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=bytes.hex)
        data = text.encode()
    return hashlib.sha256(data).hexdigest()[:16]


def record_cache(cache: Path) -> dict[str, Any]:
    """Digests of each file's bytes, of all rows of the Parquet files, and of the layout (independent of arithmetic)."""
    paths = sorted(path for path in cache.rglob("*") if path.suffix in (".tar", ".parquet", ".json"))
    files, rows, layout = {}, {}, {}
    for path in paths:
        name = str(path.relative_to(cache))
        if path.suffix == ".json":
            tree = json.loads(path.read_bytes())
            files[name], layout[name] = digest(without(tree, VOLATILE)), without(tree, VOLATILE | COMPUTED)
        elif path.suffix == ".tar":
            data = path.read_bytes()
            files[name], layout[name] = digest(data), list(members(data))
        else:
            table = pq.read_table(path)
            messages = [field.name for field in table.schema if field.name == "error" and field.type == pa.string()]
            table = table.drop_columns(messages)  # messages for people
            rows[name], layout[name] = table_of(table), table_of(table, COMPUTED_COLUMNS)
            files[name] = digest(rows[name]) if messages and len(table) else digest(path.read_bytes())
    error = json.loads((cache / "CACHE.json").read_bytes())["generations"][-1]["codec_error"]
    return {
        "files": files,
        "rows": digest(rows),
        "layout": digest(layout),
        "codec_error": [short(error["mean"]), short(error["max"])],
    }


def without(tree: Any, names: set[str], at: str = "") -> Any:
    """``tree`` without the dotted ``names``; elements of a list have the list's name."""
    if isinstance(tree, list):
        return [without(each, names, at) for each in tree]
    if isinstance(tree, dict):
        return {key: without(tree[key], names, f"{at}{key}.") for key in tree if f"{at}{key}" not in names}
    return tree


def members(data: bytes) -> Iterator[list[Any]]:
    """The size of a tar, then of each member: name, place, header, and content (JSON) or dtype and shape (array)."""
    yield [len(data)]
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        for member in tar:
            content = data[member.offset_data : member.offset_data + member.size]
            if member.name.endswith(".json"):
                kind: Any = content.decode()
            else:
                array = np.load(io.BytesIO(content))
                kind = [array.dtype.str, list(array.shape)]
            yield [member.name, member.offset_data, member.size, data[member.offset : member.offset_data].hex(), kind]


def table_of(table: pa.Table, leave: Collection[str] = ()) -> list[Any]:
    """Column names and types, and rows, of ``table`` without the columns in ``leave``."""
    table = table.drop_columns([name for name in table.column_names if name in leave])
    return [[[field.name, str(field.type)] for field in table.schema], table.to_pylist()]


def record_run(folder: Path) -> dict[str, Any]:
    """Digests of what a run wrote and of the part that is independent of arithmetic; its losses."""
    steps = [leave_out(line, TIMES) for line in lines(folder / "metrics.jsonl")]
    evaluations = [leave_out(line, TIMES | MESSAGES) for line in lines(folder / "evaluations.jsonl")]
    weights = load_file(folder / "projector.safetensors")
    fixed = [{key: None if isinstance(value, float) else value for key, value in line.items()} for line in steps]
    return {
        # the last bits of what a step reports differ between CPUs that agree in every bit of the weights
        "metrics": digest([{key: rounded(value) for key, value in line.items()} for line in steps]),
        "evaluations": digest(evaluations),
        "weights": digest([[name, weights[name].dtype.str, weights[name].tobytes().hex()] for name in sorted(weights)]),
        "layout": digest(
            [fixed, [[line["step"], sorted(line), line["n_val"]] for line in evaluations]]
            + [[name, list(weights[name].shape)] for name in sorted(weights)]
        ),
        **{name: [short(line[name]) for line in steps] for name in FLOATS},
        "val_loss": [short(line["val_loss"]) for line in evaluations],
    }


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def leave_out(tree: Mapping[str, Any], keys: set[str]) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if key not in keys}


def rounded(value: Any) -> Any:
    """Round a float to four digits."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def short(value: float) -> float:
    """Round ``value`` to six digits, enough for the tolerance."""
    return float(f"{value:.6g}")


# compare --------------------------------------------------------------------------------------------------------------


def differences(golden: Mapping[str, Any], found: Mapping[str, Any], *, exact: bool, pyarrow: bool = True) -> list[str]:
    """Return the names of the differences between two records of a cache or a run; empty if they are equal.

    Args:
        exact: the arithmetic is the recorded one, so bytes and losses must be equal.
        pyarrow: its version is the recorded one, so the bytes of Parquet files and what hashes them must be equal.
    """
    wrong = ["layout"] if golden["layout"] != found["layout"] else []
    if not exact:
        return wrong + [key for key in golden if isinstance(golden[key], list) and not near(golden[key], found[key])]
    for key in golden:
        if key == "files":
            names = sorted(golden[key].keys() | found[key].keys())
            wrong += [n for n in names if (pyarrow or n.endswith(".tar")) and golden[key].get(n) != found[key].get(n)]
        elif key != "layout" and golden[key] != found[key]:
            wrong.append(key)
    return wrong


def near(golden: Sequence[float], found: Sequence[float]) -> bool:
    """Whether both hold the same number of values, each pair within the tolerance."""
    pairs = zip(golden, found, strict=False)
    return len(golden) == len(found) and all(math.isclose(a, b, rel_tol=TOLERANCE) for a, b in pairs)


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("torch", "transformers", "numpy", "pyarrow")}


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        extractions = record_extractions(folder)
        runs = record_runs(folder)
        tree = {
            "fingerprint": fingerprint(folder),
            "versions": versions(),
            # a resumed extraction or run must equal the uninterrupted one, so it needs no digests of its own
            "extractions": {key: extractions[key] for key in (*CODECS, "grown")},
            "runs": leave_out(runs, {"resumed"}),
        }
    if extractions["killed"] != extractions[KILLED] or runs["resumed"] != runs["whole"]:
        sys.exit("error: a resumed extraction or run differs from an uninterrupted one; nothing was recorded")
    text = json.dumps(tree, indent=1)
    DIGESTS.write_text(re.sub(r"\[[^][{}]+\]", lambda numbers: " ".join(numbers[0].split()), text) + "\n")
    print(f"{DIGESTS.relative_to(ROOT)}: {DIGESTS.stat().st_size} bytes, arithmetic {tree['fingerprint']}")


if __name__ == "__main__":
    main()
