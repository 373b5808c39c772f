"""Several tasks from one cache: what is trained, what is measured for each, and what a run keeps of it."""

from __future__ import annotations

import json

import pytest
import torch
from page import Page
from tiny_cache import make_cache
from tiny_labels import write_labels, write_two_tasks
from tiny_lm import save_tiny_lm
from tiny_run import forget_after, losses, make_config

from shards.errors import UserError
from shards.read.cache import Cache
from train.data.caches import open_data
from train.data.padding import pad
from train.distributed.group import ProcessGroup
from train.evaluation.batches import UtteranceReader, other_audio
from train.evaluation.bootstrap import paired_difference
from train.evaluation.evaluate import EvalConfig, evaluate
from train.evaluation.run import evaluate_run
from train.evaluation.utterance_table import read_utterances
from train.inference.export import make_settings
from train.inference.transcribe import transcribe
from train.model.build import build_model, load_model
from train.model.prompt import PromptRow
from train.report import write_report
from train.runs.folder import read_cache_info
from train.runs.summary import format_summary
from train.trainer.fit import fit

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run on two tasks, with one of two drawn instructions for the task ``count``."""
    folder = tmp_path_factory.mktemp("tasks")
    cache = make_cache(folder / "cache", 48, val_every=3)
    (folder / "prompts.yaml").write_text("count: ['How many words?', Count the words.]")
    return make_config(
        folder, cache, f"path:{save_tiny_lm(folder / 'lm')}",
        labels=write_two_tasks(cache, folder / "two.csv"),
        prompt={"template": "slam", "prompts": str(folder / "prompts.yaml")},
        batch={"size": 4, "weights": {"transcribe": 1, "count": 0.5}},
        decode_limit=40, retrieval_limit=8, checkpoint_every=3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(config):
    return fit(config)


def lines(run, name):
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def test_every_figure_is_given_for_each_task(config, run):
    summary = json.loads((run / "summary.json").read_text())
    table = read_utterances(run)
    assert list(summary["tasks"]) == ["count", "transcribe"]
    nats = 0.0
    for name, metrics in summary["tasks"].items():
        assert metrics["n_val"] == metrics["n_decoded"] == 16
        own = table.filter([task == name for task in table["task"].to_pylist()])
        assert metrics["val_loss"] == pytest.approx(sum(own["nats"].to_pylist()) / sum(own["tokens"].to_pylist()))
        nats += metrics["val_loss"] * sum(own["tokens"].to_pylist())
        assert metrics["intervals"]["audio_gain"][0] <= metrics["audio_gain"] <= metrics["intervals"]["audio_gain"][1]
        assert {"wer", "cer", "silent_gain"} <= metrics.keys()
    assert nats / sum(table["tokens"].to_pylist()) == pytest.approx(summary["val_loss"])
    assert 0 <= summary["tasks"]["count"]["accuracy"] <= 1
    (last,) = lines(run, "evaluations.jsonl")
    assert last["val_loss/count"] == summary["tasks"]["count"]["val_loss"]
    assert last["accuracy/count"] == summary["tasks"]["count"]["accuracy"]
    steps = lines(run, "metrics.jsonl")
    assert all({"loss/count", "loss/transcribe"} & step.keys() for step in steps)
    assert all(min(step[k] for k in step if k.startswith("loss/")) <= step["loss"] for step in steps)


def test_the_end_of_a_run_and_the_report_show_the_tasks(run):
    summary = json.loads((run / "summary.json").read_text())
    line = next(line for line in format_summary(summary).splitlines() if line.startswith("task count: loss"))
    assert line.split()[3] == f"{summary['tasks']['count']['val_loss']:.4f},"
    assert "accuracy" in line
    shown = Page(write_report(run).read_text()).shown
    assert "Tasks" in shown
    assert "accuracy" in shown


def test_every_text_is_scored_after_its_own_instruction(config, run):
    model = load_model(run, config, CPU, torch.float32)
    table = read_utterances(run)
    held_out = open_data(config).held_out
    for index in range(6):
        key, task, text = (table[name][index].as_py() for name in ("key", "task", "reference"))
        features, mask = pad([held_out.features(index)])
        with torch.no_grad():
            nll = model.nll(features, mask, [text], [PromptRow(key, task)]).nll.item()
            others = [model.nll(features, mask, [text], [PromptRow(key, task, p)]).nll.item() for p in ("", "Other")]
        assert table["nats"][index].as_py() == pytest.approx(nll, rel=1e-4)
        assert others[0] == pytest.approx(nll, rel=1e-6)
        assert others[1] != pytest.approx(nll, rel=1e-4)


def test_shuffled_audio_is_that_of_another_utterance_with_another_text_of_the_same_task(config, run):
    table = read_utterances(run).to_pylist()
    rows = {(row["key"], row["task"]): row for row in table}
    heard = [row for row in table if row["heard"] is not None]
    assert len(heard) > 20
    for row in heard:
        assert row["heard"] != row["key"]
        assert rows[row["heard"], row["task"]]["reference"] != row["reference"]


def test_questions_about_one_recording_are_never_paired_with_that_recording(tmp_path):
    cache = make_cache(tmp_path / "cache", 12)
    rows = [
        {"key": row["key"], "text": answer, "prompt": question, "split": "val" if i else "train"}
        for i, row in enumerate(Cache.open(cache).manifest.to_pylist())
        for question, answer in (("Is it red?", "yes" if i % 2 else "no"), ("Is it blue?", "no" if i % 2 else "yes"))
    ]
    settings = {"labels": write_labels(tmp_path / "ask.csv", rows), "prompt": {"template": "chat"}}
    reader = UtteranceReader(
        open_data(make_config(tmp_path, cache, "", **settings)).held_out, 4, None, lambda: False, ProcessGroup()
    )
    pairs = other_audio(reader)
    assert all(pair is not None for pair in pairs)
    for i, pair in enumerate(pairs):
        assert reader.keys[i] != reader.keys[pair]
        assert reader.texts[i] != reader.texts[pair]


def test_a_task_with_one_answer_has_no_audio_gain_and_the_others_keep_theirs(tmp_path, config):
    cache = make_cache(tmp_path / "cache", 20, val_every=2)
    rows = Cache.open(cache).manifest.select(["key", "text", "split"]).to_pylist()
    rows = [{**row, "task": "say"} for row in rows] + [{**row, "text": "yes", "task": "any"} for row in rows]
    settings = make_config(tmp_path, cache, config.lm.model, labels=write_labels(tmp_path / "a.csv", rows))
    data, model = open_data(settings), build_model(settings, 8, CPU, torch.float32)
    found = evaluate(model, data.held_out, EvalConfig(decode_limit=0))
    assert "audio_gain" not in found.tasks["any"]
    assert found.audio_gain == pytest.approx(found.tasks["say"]["audio_gain"])


def test_rows_of_one_key_are_compared_each_with_itself(run, config):
    table = read_utterances(run)
    assert paired_difference(table, table).mean == 0
    assert len(set(zip(*(table[name].to_pylist() for name in ("key", "task")), strict=True))) == 32


def test_a_run_on_tasks_resumes_to_the_same_losses_and_refuses_other_instructions(config, tmp_path):
    (tmp_path / "prompts.yaml").write_text("count: ['How many words?', Count the words.]")
    prompt = config.prompt.model_copy(update={"prompts": str(tmp_path / "prompts.yaml")})
    config = config.model_copy(update={"prompt": prompt, "name": "again"})
    run = fit(config)
    whole = losses(run)
    forget_after(run, 6)
    fit(config, run)
    assert losses(run) == whole
    forget_after(run, 6)
    (tmp_path / "prompts.yaml").write_text("count: ['How many?']")
    with pytest.raises(UserError, match=r"the prompts of .* changed"):
        fit(config, run)


def test_a_finished_run_needs_no_file_of_instructions(config, tmp_path):
    (tmp_path / "prompts.txt").write_text("Write.\nWrite it down.\n")
    prompt = config.prompt.model_copy(update={"prompts": str(tmp_path / "prompts.txt")})
    run = fit(config.model_copy(update={"prompt": prompt, "name": "moved"}))
    (tmp_path / "prompts.txt").unlink()
    config = config.model_copy(update={"prompt": prompt})
    loss = json.loads((run / "summary.json").read_text())["val_loss"]
    assert evaluate_run(run, config)["val_loss"] == pytest.approx(loss)
    model = load_model(run, config, CPU, torch.float32)
    settings = make_settings(config, read_cache_info(run), model.lm, model.projector, model.prompt.instructions)
    assert settings.instructions == {"": ["Write.", "Write it down."]}


def test_instructions_for_a_task_that_no_row_has_are_refused(config, tmp_path):
    (tmp_path / "prompts.yaml").write_text("cuont: [How many words]")
    prompt = config.prompt.model_copy(update={"prompts": str(tmp_path / "prompts.yaml")})
    with pytest.raises(UserError, match=r"instructions for the task 'cuont', and the tasks .* 'count', 'transcribe'"):
        fit(config.model_copy(update={"prompt": prompt, "name": "typo"}))


def test_an_instruction_that_the_prompt_cannot_show_is_refused(config, tmp_path):
    plain = config.model_copy(update={"prompt": type(config.prompt)()})
    with pytest.raises(UserError, match=r"has no \{instruction\} .* leave out --instruction"):
        next(transcribe(tmp_path, plain, [], instruction="Count."))


def test_a_run_on_one_task_writes_what_it_always_wrote(tmp_path, config):
    cache = make_cache(tmp_path / "cache", 12, val_every=3)
    run = fit(make_config(tmp_path, cache, config.lm.model, steps=2))
    assert "tasks" not in json.loads((run / "summary.json").read_text())
    assert not [key for line in lines(run, "evaluations.jsonl") for key in line if "/" in key]
    assert not [key for line in lines(run, "metrics.jsonl") for key in line if "/" in key]
    assert "task" not in read_utterances(run).column_names
