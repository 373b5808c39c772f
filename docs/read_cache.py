"""Read an earshard cache with the standard library, NumPy and pyarrow alone: python docs/read_cache.py CACHE

A reader for other languages can be written after docs/format.md; this one shows how little it takes.
"""

import hashlib
import io
import json
import sys
import zlib
from itertools import groupby
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq


def read_cache(folder, labels="source"):
    """Yield (features float32 [frames, channels], label row) of every item of a label set, in order."""
    info, index = sealed(folder, "CACHE.json"), sealed(folder, "labels/LABELS.json")
    if info["schema_version"] != 2:
        raise ValueError(f"cache format {info['schema_version']}, and this reads 2")
    entry = [entry for entry in index["sets"] if labels in (entry["name"], entry["id"])][-1]
    rows = table(folder, f"labels/{entry['file']['name']}", entry["file"])
    said = {key: list(group) for key, group in groupby(rows, key=lambda row: row["key"])}
    manifests, newest = [], {}  # newest: the last generation that planned a key
    for number, files in enumerate(generation["files"] for generation in info["generations"]):
        manifests.append(table(folder, f"manifests/{number:03d}.parquet", files["manifest"]))
        failures = table(folder, f"failures/{number:03d}.parquet", files["failures"])
        newest |= {row["key"]: number for row in manifests[-1] + failures}
    for number, row in ((number, row) for number, manifest in enumerate(manifests) for row in manifest):
        if newest[row["key"]] == number and row["key"] in said:
            features = read_row(Path(folder, "shards", f"{row['shard']:06d}.tar"), row, info["spec"]["codec"])
            yield from ((features, label) for label in said[row["key"]])


def read_row(tar, row, codec):
    places = [(row["offset"], row["length"]), (row["scale_offset"], row["scale_length"])]
    with open(tar, "rb") as file:
        members = [file.seek(at) and file.read(length) for at, length in places if length]
    if zlib.crc32(b"".join(members)) != row["crc32"]:
        raise ValueError(f"utterance {row['key']} in {tar} is damaged")
    return decode(codec, *(np.load(io.BytesIO(data), allow_pickle=False) for data in members))


def table(folder, name, file):
    data = Path(folder, name).read_bytes()
    if (len(data), hashlib.sha256(data).hexdigest()) != (file["bytes"], file["sha256"]):
        raise ValueError(f"{name} is damaged")
    return pq.read_table(io.BytesIO(data)).to_pylist()


def sealed(folder, name):
    digest = (tree := json.loads(Path(folder, name).read_bytes())).pop("sha256")
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    if hashlib.sha256(text.encode()).hexdigest() != digest:
        raise ValueError(f"{name} is damaged")
    return tree


def decode(codec, x, scale=1):
    if codec == "bf16":
        return (x.astype(np.uint32) << 16).view(np.float32)
    if codec == "fp8":
        exponent, mantissa, sign = (x >> 3 & 15).astype(int), x & 7, np.where(x & 128, -1.0, 1.0)
        x = sign * np.where(exponent, np.ldexp(1 + mantissa / 8, exponent - 7), np.ldexp(mantissa / 8, -6))
    return x.astype(np.float32) * scale


if __name__ == "__main__":
    for features, label in read_cache(sys.argv[1]):
        print(label["key"], features.shape, f"{features.mean():+.4f}", label["text"])
