"""A run's ids are those of its training: another day is replayed, another file is refused by name."""

from __future__ import annotations

import json
import shutil
import sys
from datetime import datetime
from importlib import import_module

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from tiny_cache import make_cache
from tiny_lm import CHAT, save_tiny_lm
from tiny_run import forget_after, losses, make_config
from tiny_sweep import make_sweep

import train.lms.hf.model
import train.trainer.fit
from shards.errors import UserError
from train import Projector
from train.evaluation.run import evaluate_run
from train.inference.export import export, load_projector
from train.lms.base import LanguageModel
from train.model.build import build_model, load_model
from train.model.prompt import PromptRow
from train.model.replay import LM_RECORD, read_lm_record
from train.runs.folder import run_config
from train.sweeps.sweep import run_sweep
from train.trainer.fit import fit

DATED = "{{ strftime_now('%d %B %Y') }}\n" + CHAT
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A finished run under a chat template that shows the date, and its language model."""
    folder = tmp_path_factory.mktemp("replay")
    lm = save_tiny_lm(folder / "lm", eos="<|pad|>")  # the template ends an answer with <|im_end|>
    (lm / "chat_template.jinja").write_text(DATED)
    cache = make_cache(folder / "cache", 24, val_every=3)
    config = make_config(folder, cache, f"path:{lm}", steps=2, prompt={"template": "chat"}, checkpoint_every=1)
    return fit(config), lm


@pytest.fixture
def copy(world, tmp_path):
    """A copy of the run, whose settings name a copy of the language model."""
    run, lm = world
    shutil.copytree(run, tmp_path / "run")
    shutil.copytree(lm, tmp_path / "lm")
    path = tmp_path / "run" / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["lm"]["model"], config["runs"], config["name"] = f"path:{tmp_path / 'lm'}", str(tmp_path), "run"
    path.write_text(yaml.safe_dump(config))
    return tmp_path / "run", tmp_path / "lm"


class Tomorrow(datetime):
    @classmethod
    def now(cls, tz=None):
        return datetime(2031, 1, 2, 3, 4)


def test_a_template_with_a_date_shows_the_day_of_training_in_every_later_use(world, monkeypatch):
    run, _ = world
    monkeypatch.setattr(train.lms.hf.model, "datetime", Tomorrow)
    record = read_lm_record(run)
    model = load_model(run, run_config(run), CPU, torch.float32)
    assert list(model.prompt.prefix) == record["prefix"]
    assert "2031" not in model.prompt.text
    summary = json.loads((run / "summary.json").read_text())
    assert evaluate_run(run, run_config(run))["val_loss"] == summary["val_loss"]
    rows = [PromptRow(prompt="Count the words.")]
    assert "2031" not in model.lm.tokenizer.decode(model.prompt.ids(rows)[0][0])
    fresh = build_model(run_config(run), 8, CPU, torch.float32)
    assert "2031" in fresh.prompt.text


def edit(path, **changed):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


CHANGES = {
    "tokenizer.json": lambda lm: (lm / "tokenizer.json").write_text((lm / "tokenizer.json").read_text() + "\n"),
    "config.json": lambda lm: edit(lm / "config.json", rms_norm_eps=0.1),
    "generation_config.json": lambda lm: edit(lm / "generation_config.json", eos_token_id=[2, 7]),
    "tokenizer_config.json": lambda lm: edit(lm / "tokenizer_config.json", eos_token="<|im_start|>"),
    "chat_template.jinja": lambda lm: (lm / "chat_template.jinja").write_text(CHAT),
    "added_tokens.json is new": lambda lm: (lm / "added_tokens.json").write_text("{}"),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_a_changed_file_of_the_language_model_is_refused_by_its_name(copy, name):
    run, lm = copy
    CHANGES[name](lm)
    with pytest.raises(UserError, match=name.partition(" ")[0]):
        evaluate_run(run, run_config(run))
    (run / "summary.json").unlink()
    with pytest.raises(UserError, match=name.partition(" ")[0]):
        fit(run_config(run), run)  # resume


def change_weights(lm):
    tensors = load_file(lm / "model.safetensors")
    name = min(tensors)
    save_file({**tensors, name: tensors[name] + 1}, lm / "model.safetensors", {"format": "pt"})


def test_changed_weights_of_the_language_model_are_refused(copy):
    run, lm = copy
    change_weights(lm)
    with pytest.raises(UserError, match=r"the weights of the language model '.*' changed since"):
        evaluate_run(run, run_config(run))


def test_an_export_holds_the_ids_of_its_run_on_any_day(world, tmp_path, monkeypatch):
    run, lm = world
    monkeypatch.setattr(train.lms.hf.model, "datetime", Tomorrow)
    folder = export(run, tmp_path / "exported")
    assert read_lm_record(folder) == read_lm_record(run)
    assert isinstance(load_projector(folder, lm=lm), Projector)


@pytest.mark.parametrize("name", [*CHANGES, "the weights"])
def test_an_export_refuses_another_language_model_by_the_name_of_what_changed(world, copy, tmp_path, monkeypatch, name):
    lm = copy[1]
    folder = export(world[0], tmp_path / "exported")
    {**CHANGES, "the weights": change_weights}[name](lm)
    wanted = f"^{name.partition(' is')[0]} .*{'is new' if name.endswith('new') else 'differs|are not those'}"
    with pytest.raises(UserError, match=wanted):
        load_projector(folder, lm=lm)
    monkeypatch.syspath_prepend(folder)
    with pytest.raises(ValueError, match=wanted):
        import_module("projector").load(folder, lm=lm)
    for module in [each for each in sys.modules if each.partition(".")[0] == "projector"]:
        del sys.modules[module]


def test_an_export_that_cannot_know_its_language_model_says_so(world, tmp_path):
    run, lm = world
    folder = export(run, tmp_path / "exported")
    with pytest.raises(UserError, match="'nowhere' is not a folder"):
        load_projector(folder, lm="nowhere")
    corrupt = '{"files": 5, "language_model": ""}'
    for damage, words in [(corrupt, "is corrupt"), ("[", "is corrupt"), (None, r"no lm\.json")]:
        (folder / LM_RECORD).unlink() if damage is None else (folder / LM_RECORD).write_text(damage)
        with pytest.raises(UserError, match=words):
            load_projector(folder, lm=lm)


def test_other_ids_from_the_same_files_are_refused_with_both(copy, monkeypatch):
    from train.lms.hf.model import HfTokenizer

    run, _ = copy
    encode = HfTokenizer.encode
    monkeypatch.setattr(HfTokenizer, "encode", lambda *a, **k: [7, *encode(*a, **k)])
    with pytest.raises(UserError, match=r"tokenization of '.*' changed although the files .* got \[7, "):
        load_model(run, run_config(run), CPU, torch.float32)


def test_a_run_from_before_the_record_is_used_as_it_was_trained(copy):
    run, lm = copy
    assert read_lm_record(run)["end"] == 2
    (run / LM_RECORD).unlink()
    (lm / "chat_template.jinja").write_text((lm / "chat_template.jinja").read_text() + "{# another file #}")
    model = load_model(run, run_config(run), CPU, torch.float32)
    assert (model.prompt.end, model.prompt.ends) == (0, {0, 2})
    evaluate_run(run, run_config(run))


@pytest.mark.parametrize("damage", ["[]", '{"files": {}}', '{"date": 5}', "{"])
def test_a_corrupt_record_is_refused_in_one_sentence(copy, damage):
    run, _ = copy
    (run / LM_RECORD).write_text(damage)
    with pytest.raises(UserError, match=r"lm\.json"):
        load_model(run, run_config(run), CPU, torch.float32)


def test_a_sweep_records_the_ids_of_each_experiment(world, tmp_path, monkeypatch):
    _, lm = world
    cache = make_cache(tmp_path / "cache", 24, val_every=3)
    experiments = [{"name": "chat", "prompt": {"template": "chat"}}, {"name": "slam", "prompt": {"template": "slam"}}]
    sweep = make_sweep(tmp_path, cache, f"path:{lm}", {"steps": 2}, experiments=experiments)
    folder = run_sweep(sweep)
    monkeypatch.setattr(train.lms.hf.model, "datetime", Tomorrow)
    for name in ("chat", "slam"):
        run = folder / name
        model = load_model(run, run_config(run), CPU, torch.float32)
        assert list(model.prompt.suffix) == read_lm_record(run)["suffix"]
        assert "2031" not in model.prompt.text


def test_a_run_keeps_how_many_logits_it_computes_at_a_time(tmp_path, monkeypatch):
    lm, cache = save_tiny_lm(tmp_path / "lm"), make_cache(tmp_path / "cache", n=24, channels=8, val_every=4)
    keys = {"steps": 4, "checkpoint_every": 2, "eval_every": 0}
    used, own = [], LanguageModel._token_nll
    monkeypatch.setattr(LanguageModel, "_token_nll", lambda lm, *args: used.append(lm.max_logits) or own(lm, *args))
    monkeypatch.setattr(train.trainer.fit, "choose_max_logits", lambda device: 2**26)
    config = make_config(tmp_path, cache, f"path:{lm}", **keys)
    run = fit(config)
    found = losses(run)
    monkeypatch.setattr(train.trainer.fit, "choose_max_logits", lambda device: 2**28)  # another process used the memory
    forget_after(run, 2)
    fit(config, resume=run)
    assert losses(run) == found
    assert read_lm_record(run)["max_logits"] == 2**26
    assert set(used) == {2**26}
    path = run / LM_RECORD
    path.write_text(json.dumps({**json.loads(path.read_text()), "max_logits": 2**60}))
    with pytest.raises(UserError, match="no valid 'max_logits'"):
        read_lm_record(run)
