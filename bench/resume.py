"""Seconds to the first padded batch of a run resumed at 1 %, 50 % and 99 % of an epoch, for earshard and its peers.

    python bench/resume.py                    # 2 GB, medians of 3
    python bench/resume.py --megabytes 300 --repeats 1

Every run reopens its data, as a restarted process does; imports are not counted. A library that cannot save its state
skips batches, as its users do.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from ours import BATCH, FirstEpoch, FirstEpochUnchecked, OneThread, write_cache
from peers import PEERS, LitDataBucketed, WebdatasetWorkers

from shards.read.cache import Cache

PLACES = (0.01, 0.5, 0.99)
SKIPPED = (OneThread, FirstEpochUnchecked, WebdatasetWorkers, LitDataBucketed)  # they resume like their parent class


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="", help="only peers whose names contain this text")
    parser.add_argument("--folder", default=None, help="folder for temporary data")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp())
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        cache = write_cache(Path(name) / "cache", arguments.megabytes)
        batches = len(Cache.open(cache)) // BATCH  # full batches, which every library yields
        places = [int(part * batches) for part in PLACES]
        print(f"{arguments.megabytes} MB, {batches} batches of {BATCH}, medians of {arguments.repeats}")
        print(f"{'seconds to the first batch at':34}" + "".join(f"{part:>10.0%}" for part in PLACES))
        for kind in PEERS:
            if kind in SKIPPED or arguments.only.lower() not in kind.label.lower():
                continue
            if kind.label == "earshard":  # a restart reopens the cache: FirstEpoch
                continue
            if kind.version() is None:
                print(f"{kind.label:34}{'not installed':>20}")
                continue
            folder = Path(name) / kind.label
            folder.mkdir(exist_ok=True)
            try:
                peer = kind(cache, folder)
                peer.prepare()
                next(iter(peer.batches()))  # imports
                if isinstance(peer, FirstEpoch):
                    peer.remember(places)
                found = []
                for place in places:
                    seconds = []
                    for _ in range(arguments.repeats):
                        begin = time.perf_counter()
                        next(iter(peer.resumed(place)))
                        seconds.append(time.perf_counter() - begin)
                    found.append(statistics.median(seconds))
            except Exception:  # report a peer that fails, and measure the others
                print(f"{kind.label} {kind.version()} failed: {traceback.format_exc(limit=-1).splitlines()[-1]}")
                continue
            label = "earshard" if kind is FirstEpoch else f"{kind.label} {kind.version()}"
            print(f"{label:34}" + "".join(f"{value:10.3f}" for value in found), flush=True)
            if kind is FirstEpoch:
                print(f"{'  (target: below 0.2, constant)':34}")


if __name__ == "__main__":
    main()
