"""Read an earshard cache with the standard library and NumPy alone: python docs/read_cache.py CACHE

A reader for other languages can be written after docs/format.md; this one shows how little it takes.
"""

import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np


def read_cache(folder):
    """Yield (key, features float32 [frames, channels], about) of every utterance, in the order of the plan."""
    info = sealed(Path(folder, "CACHE.json"))
    if info["schema_version"] != 1:
        raise ValueError(f"cache format {info['schema_version']}, and this reads 1")
    for shard in range(info["counts"]["shards"]):
        record = sealed(Path(folder, "shards", f"{shard:06d}.json"))
        data = Path(folder, "shards", f"{shard:06d}.tar").read_bytes()
        found = [record["feature_id"], record["plan_id"], record["shard"], hashlib.sha256(data).hexdigest()]
        if found != [info["feature_id"], info["plan_id"], shard, record["tar"]["sha256"]]:
            raise ValueError(f"shard {shard} is damaged, or of another cache")
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            parts = {member.name: io.BytesIO(tar.extractfile(member).read()) for member in tar}
        for about in (json.load(data) for name, data in parts.items() if name.endswith(".json")):
            names = (f"{about['key']}{kind}" for kind in (".npy", ".scale.npy"))
            arrays = [np.load(parts[name], allow_pickle=False) for name in names if name in parts]
            yield about["key"], decode(about["codec"], *arrays), about


def sealed(path):
    digest = (tree := json.loads(path.read_bytes())).pop("sha256")
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    if hashlib.sha256(text.encode()).hexdigest() != digest:
        raise ValueError(f"{path} is damaged")
    return tree


def decode(codec, x, scale=1):
    if codec == "bf16":
        return (x.astype(np.uint32) << 16).view(np.float32)
    if codec == "fp8":
        exponent, mantissa, sign = (x >> 3 & 15).astype(int), x & 7, np.where(x & 128, -1.0, 1.0)
        x = sign * np.where(exponent, np.ldexp(1 + mantissa / 8, exponent - 7), np.ldexp(mantissa / 8, -6))
    return x.astype(np.float32) * scale


if __name__ == "__main__":
    for key, features, about in read_cache(sys.argv[1]):
        print(key, features.shape, f"{features.mean():+.4f}", about["text"])
