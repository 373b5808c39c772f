"""Stage 1: a projector trained by CTC without the language model, and the stage 2 that starts from it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from launch import finish, torchrun
from safetensors.torch import load_file, save_file
from tiny_cache import make_cache
from tiny_lm import save_tiny_lm
from tiny_run import forget_after, losses, make_config, write_config
from tiny_sweep import make_sweep, same_run

from shards.errors import UserError
from train.__main__ import command
from train.config.model import LmConfig
from train.data.caches import open_data
from train.inference.export import export, load_projector
from train.lms.embeddings import read_embeddings
from train.lms.load import load_lm
from train.model.audio_lm import AudioLM
from train.model.build import build_model, load_model
from train.model.checkpoint import checkpoints
from train.model.ctc import TOKENS_FILE, label_tokens, read_tokens, start_from_stage_one
from train.runs.folder import read_json
from train.sweeps.config import experiments
from train.sweeps.sweep import run_sweep
from train.trainer.fit import fit

POSTERIOR = {"kind": "posterior", "hidden": 12, "dropout": 0.1}
STAGE = {"steps": 6, "eval_every": 3, "augment": {"time_masks": 1, "time_mask_frames": 5}}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("stages") / "cache", 24, val_every=6, min_frames=90, max_frames=140)


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return f"path:{save_tiny_lm(tmp_path_factory.mktemp('stages') / 'lm')}"


def settings(folder, cache, lm, **keys):
    return make_config(folder, cache, lm, **{"pretrain": STAGE, "checkpoint_every": 4, "eval_every": 4, **keys})


@pytest.fixture(
    scope="module", params=[POSTERIOR, {"kind": "mlp", "stack": 2, "norm": "rms"}], ids=["posterior", "mlp"]
)
def whole(request, tmp_path_factory, cache, lm):
    config = settings(tmp_path_factory.mktemp("whole"), cache, lm, projector=request.param, ctc={"weight": 0.2})
    return config, fit(config)


def test_the_embeddings_read_without_the_model_are_those_that_it_looks_up(lm):
    model = load_lm(lm, device="cpu", dtype=torch.float32)
    found = read_embeddings(lm, LmConfig(model=lm))
    ids = [0, 3, 17, found.count - 1]
    assert torch.equal(found.rows(ids), model.embed(torch.tensor(ids)))
    assert (found.identity, found.width, found.files) == (model.identity, model.width, model.files)
    assert found.rms() == pytest.approx(model.embedding_rms, rel=0.05)
    assert found.tokenizer.encode("turn left") == model.tokenizer.encode("turn left")


def test_stage_two_starts_from_the_weights_of_stage_one(whole):
    config, run = whole
    first = read_json(run / "pretrain" / "summary.json")
    assert first["steps"] == 6
    assert first["wer"] is not None
    lines = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 4, 8]
    assert lines[0]["elapsed"] >= first["seconds"]
    assert "ctc" in json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    model = build_model(config, 8, torch.device("cpu"), torch.float32, tokens=read_tokens(run))
    start_from_stage_one(model, run / "pretrain")
    stage = load_file(run / "pretrain" / "projector.safetensors")
    copied = {name: value for name, value in model.named_parameters() if name.startswith("projector.")}
    assert copied
    assert all(torch.equal(value, stage[f"projector.{name}"]) for name, value in copied.items())


@pytest.mark.parametrize("stage_one", [True, False], ids=["in stage 1", "in stage 2"])
def test_a_run_that_is_resumed_equals_one_that_never_stopped(tmp_path, whole, stage_one):
    config, run = whole
    halved = tmp_path / "runs" / "halved"
    shutil.copytree(run, halved)
    forget_after(halved, 0 if stage_one else 4)
    assert bool(checkpoints(halved / "checkpoints")) != stage_one
    if stage_one:
        forget_after(halved / "pretrain", 4)
        shutil.rmtree(halved / "checkpoints")
        (halved / "checkpoints").mkdir()
        (halved / "metrics.jsonl").unlink()
    fit(config.model_copy(update={"name": "halved", "runs": str(tmp_path / "runs")}), halved)
    assert losses(halved / "pretrain") == losses(run / "pretrain")
    assert losses(halved) == losses(run)
    one, two = (load_file(each / "projector.safetensors") for each in (halved, run))
    assert all(torch.equal(one[name], two[name]) for name in two)


def test_a_sweep_trains_its_stages_in_lockstep_like_single_runs(tmp_path, cache, lm):
    listed = [
        {"name": "posterior", "projector": POSTERIOR, "pretrain": STAGE},
        {"name": "slow", "projector": {"kind": "mlp", "stack": 2}, "pretrain": {**STAGE, "lr": 1e-3, "steps": 4}},
        {"name": "plain"},
    ]
    config = make_sweep(tmp_path, cache, lm, experiments=listed)
    folder = run_sweep(config)
    for each in experiments(config):
        alone = fit(each.model_copy(update={"runs": str(tmp_path / "alone")}))
        same_run(folder / str(each.name), alone)
        if each.pretrain.steps:
            same_run(folder / str(each.name) / "pretrain", alone / "pretrain")


def test_pretrain_stops_after_stage_one_and_fit_goes_on(tmp_path, cache, lm, capsys):
    config = write_config(tmp_path / "run.yaml", settings(tmp_path, cache, lm, projector=POSTERIOR))
    assert command(["pretrain", "--config", str(config)]) == 0
    run = tmp_path / "runs" / "run"
    assert "stage 2 starts from it: python -m train fit --resume" in capsys.readouterr().out
    assert (run / "pretrain" / "report.html").is_file()
    assert not (run / "summary.json").exists()
    assert command(["fit", "--resume", str(run)]) == 0
    assert (run / "summary.json").is_file()


def test_another_run_starts_from_a_finished_stage_one(tmp_path, whole, cache):
    config, run = whole
    other = config.model_copy(
        update={
            "name": "other",
            "runs": str(tmp_path),
            "steps": 1,
            "pretrain": config.pretrain.model_copy(update={"steps": 0, "start": str(run)}),
        }
    )
    fit(other)
    assert losses(tmp_path / "other")[0] == losses(run)[0]
    log = tmp_path / "other" / "evaluations.jsonl"
    assert (
        json.loads(log.read_text().splitlines()[0])["elapsed"]
        >= read_json(run / "pretrain" / "summary.json")["seconds"]
    )
    with pytest.raises(UserError, match="has no finished stage 1"):
        fit(other.model_copy(update={"name": "third", "pretrain": other.pretrain.model_copy(update={"start": "none"})}))


STANDALONE = """
import sys
sys.modules.update(dict.fromkeys(("train", "pipeline", "shards")))
sys.path.insert(0, sys.argv[1])
import torch
from safetensors.torch import load_file, save_file
from projector import load
x = load_file(sys.argv[2])["x"].clone()
soft, mask = load(sys.argv[1])(x, torch.ones(x.shape[:2], dtype=torch.bool))
save_file({"soft": soft.detach().contiguous(), "mask": mask}, sys.argv[3])
"""


def test_an_export_of_a_posterior_makes_the_soft_tokens_of_the_run(tmp_path, whole):
    config, run = whole
    folder = export(run, tmp_path / "export")
    features = torch.randn(2, 60, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 60, dtype=torch.bool)
    save_file({"x": features}, tmp_path / "x")
    model = load_model(run, config, torch.device("cpu"), torch.float32)
    expected, expected_mask = model.projector(load_file(tmp_path / "x")["x"].clone(), mask)
    loaded = load_projector(folder)(load_file(tmp_path / "x")["x"].clone(), mask)
    done = subprocess.run(
        [sys.executable, "-P", "-c", STANDALONE, folder, tmp_path / "x", tmp_path / "out"],
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        check=False,
    )
    assert done.returncode == 0
    alone = load_file(tmp_path / "out")
    for soft, soft_mask in (loaded, (alone["soft"], alone["mask"])):
        assert torch.equal(soft_mask, expected_mask)
        assert torch.equal(soft[soft_mask], expected[expected_mask])


def test_a_run_needs_the_stage_one_of_another_only_until_it_began(tmp_path, whole):
    config, run = whole
    stage = tmp_path / "stage"
    shutil.copytree(run / "pretrain", stage)
    other = config.model_copy(
        update={
            "name": "other",
            "runs": str(tmp_path),
            "pretrain": config.pretrain.model_copy(update={"steps": 0, "start": str(stage)}),
        }
    )
    whole_run = fit(other)
    shutil.copytree(whole_run, tmp_path / "halved")
    forget_after(tmp_path / "halved", 4)
    assert checkpoints(tmp_path / "halved" / "checkpoints")
    shutil.rmtree(stage)
    fit(other.model_copy(update={"name": "halved"}), tmp_path / "halved")
    assert losses(tmp_path / "halved") == losses(whole_run)


def test_a_stage_one_that_does_not_say_how_long_it_took_is_refused(tmp_path, whole):
    _, run = whole
    shutil.copytree(run / "pretrain", tmp_path / "stage")
    for wrong in ("12", [1], None):
        (tmp_path / "stage" / "summary.json").write_text(json.dumps({"seconds": wrong}))
        with pytest.raises(UserError, match="does not say how many seconds"):
            start_from_stage_one(AudioLM.__new__(AudioLM), tmp_path / "stage")


@pytest.mark.slow
def test_two_processes_train_both_stages_as_one_does(tmp_path, cache, lm):
    keys = {"projector": {"kind": "mlp", "stack": 2, "norm": "rms"}, "eval_every": 0, "batch": {"size": 4}}
    alone = fit(settings(tmp_path / "alone", cache, lm, **keys))
    config = settings(tmp_path, cache, lm, **keys)
    finish(torchrun(2, "--config", write_config(tmp_path / "c.yaml", config)))
    run = tmp_path / "runs" / "run"
    assert losses(run / "pretrain") == pytest.approx(losses(alone / "pretrain"), rel=1e-3)
    assert losses(run) == pytest.approx(losses(alone), rel=1e-3)


def test_embeddings_that_are_codes_are_refused(tmp_path, lm):
    folder = tmp_path / "codes"
    shutil.copytree(lm.removeprefix("path:"), folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if "embed_tokens" in name)
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError):
        read_embeddings(f"path:{folder}", LmConfig(model=f"path:{folder}"))


def test_a_stage_one_is_not_exported(tmp_path, whole):
    _, run = whole
    with pytest.raises(UserError, match="export the run around it"):
        export(run / "pretrain", tmp_path / "export")


def test_stage_one_alone_is_evaluated_without_the_language_model(whole, capsys):
    _, run = whole
    assert command(["evaluate", str(run / "pretrain")]) == 0
    found = json.loads(capsys.readouterr().out.partition("{")[2].join(["{", ""]))
    assert found["wer"] == pytest.approx(read_json(run / "pretrain" / "summary.json")["wer"])


def test_the_temperature_may_change_in_an_evaluation(whole, capsys):
    config, run = whole
    if config.projector.kind == "posterior":
        assert command(["evaluate", str(run), "projector.temperature=2.0"]) == 0
    else:
        with pytest.raises(UserError):
            command(["evaluate", str(run), "projector.temperature=2.0"])


def test_texts_with_more_tokens_than_time_steps_are_told_and_most_of_them_refused(tmp_path, cache, lm):
    config = settings(tmp_path, cache, lm, projector={"kind": "mlp", "stack": 60})
    with pytest.raises(UserError, match="CTC cannot align them: stack fewer frames"):
        fit(config)
    assert not (tmp_path / "runs" / "run").exists()  # the corrected command may use the same name


def test_a_file_of_tokens_that_is_no_list_of_ids_is_refused(tmp_path):
    for wrong in ([], [3, 2], [1, 1], [-1], ["1"], [True], [2**40], {"a": 1}, None):
        (tmp_path / TOKENS_FILE).write_text(json.dumps({"tokens": wrong}))
        with pytest.raises(UserError, match="does not list token ids"):
            read_tokens(tmp_path)


class Pieces:
    """Letters, and longer pieces that this tokenizer does not choose."""

    pieces = (*"abcdefghijklmnopqrstuvwxyz ", "re", "QU", "gre", "zz", "left")

    def encode(self, text, special=False):
        return [self.pieces.index(letter) for letter in text]

    def decode(self, ids):
        return "".join(self.pieces[each] for each in ids)


def test_negatives_are_further_tokens_of_the_same_characters(tmp_path, cache, lm):
    found = {}
    for count in (0, 2, 9):
        config = settings(tmp_path, cache, lm, pretrain={**STAGE, "negatives": count})
        tokens = label_tokens(open_data(config), config, Pieces(), len(Pieces.pieces))
        found[count] = [Pieces().decode([each]) for each in tokens]
    assert "z" not in found[0]
    assert found[2] == [*found[0], "re", "gre"]
    assert found[9] == [*found[0], "re", "gre", "left"]
