from __future__ import annotations

import json
import threading
import time

from pipeline.profile import StageTimes


def spin(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass


def test_the_busiest_stage_is_named_and_decoding_is_shared_by_its_workers():
    stages = StageTimes()
    assert stages.bottleneck(1) == ""
    with stages.timed("read"):
        spin(0.001)
    with stages.timed("encode"):
        spin(0.03)
    stages.busy_seconds["decode"] = 1.5 * stages.busy_seconds["encode"]
    assert stages.bottleneck(1).startswith("decode ")
    assert stages.bottleneck(2).startswith("encode ")


def test_blocks_of_several_threads_add_up_and_a_failed_block_counts():
    stages = StageTimes()

    def work() -> None:
        try:
            with stages.timed("decode"):
                spin(0.005)
                raise ValueError
        except ValueError:
            pass

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stages.busy_seconds["decode"] >= 0.015


def test_the_profile_holds_the_table_and_a_trace_of_every_block(tmp_path):
    stages = StageTimes(trace=True)
    with stages.timed("encode"), stages.timed_wait("store"):
        spin(0.001)
    stages.write(tmp_path / "profile.json", 2)
    found = json.loads((tmp_path / "profile.json").read_text())
    assert set(found["stages"]) == {"encode"}
    assert set(found["waited"]) == {"store"}
    blocks = [event for event in found["traceEvents"] if event["ph"] == "X"]
    assert {event["name"] for event in blocks} == {"encode", "wait for store"}
    assert all(event["dur"] >= 1000 for event in blocks)
    (name,) = [event for event in found["traceEvents"] if event["ph"] == "M"]
    assert (name["name"], name["args"]["name"], name["tid"]) == ("thread_name", "MainThread", blocks[0]["tid"])
    assert [line.split()[0] for line in stages.table(2)] == ["stage", "encode"]
