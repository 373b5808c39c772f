from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_cache import make_cache
from tiny_lm import save_tiny_lm
from tiny_run import make_config

from shards.errors import UserError
from train.data.caches import open_data
from train.evaluation.batches import derangement
from train.evaluation.error_rates import error_rates, make_sample
from train.evaluation.evaluate import EvalConfig, Stopped, evaluate
from train.evaluation.run import evaluate_run
from train.model.build import build_model
from train.trainer.fit import fit


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder, cache, config) with 24 utterances, six held out, and a tiny frozen LM."""
    folder = tmp_path_factory.mktemp("evaluate")
    cache = make_cache(folder / "cache", 24, val_every=4)
    lm = save_tiny_lm(folder / "lm")
    return folder, cache, make_config(folder, cache, f"path:{lm}")


@pytest.fixture(scope="module")
def finished(world):
    """The run of ``world``."""
    return fit(world[2])


@pytest.fixture(scope="module")
def model(world):
    return build_model(world[2], 8, torch.device("cpu"), torch.float32)


@given(st.lists(st.sampled_from("abcdef"), max_size=30), st.integers(0, 3))
def test_no_text_is_paired_with_an_equal_text_whenever_that_is_possible(texts, seed):
    other = derangement(texts, seed)
    largest = max(Counter(texts).values(), default=0)
    if other is None:
        assert not texts or 2 * largest > len(texts)
    else:
        assert sorted(other) == list(range(len(texts)))
        assert all(texts[i] != texts[j] for i, j in enumerate(other))


def test_the_derangement_is_deterministic():
    assert derangement(list("abcdefgh")) == derangement(list("abcdefgh"))


def test_metrics_do_not_depend_on_how_utterances_are_batched(world, model):
    held = open_data(world[2]).held_out
    one, many, narrow = (
        evaluate(model, held, EvalConfig(batch_size=size, max_frames=frames, decode_limit=3, max_new_tokens=4))
        for size, frames in ((1, None), (16, None), (16, 50))
    )
    for other in (many, narrow):
        assert other.val_loss == pytest.approx(one.val_loss, rel=1e-5)
        assert other.val_loss_shuffled == pytest.approx(one.val_loss_shuffled, rel=1e-5)
        assert other.projector_rms_ratio == pytest.approx(one.projector_rms_ratio, rel=0.05)
        assert other.samples == one.samples


def test_every_target_token_has_equal_weight(world, model):
    held = open_data(world[2]).held_out
    nats, tokens = 0.0, 0
    for i, text in enumerate(held.columns("text")["text"]):
        features = torch.tensor(held.features(i)[None].copy())
        out = model.eval().nll(features, torch.ones(features.shape[:2], dtype=torch.bool), [text])
        nats, tokens = nats + float(out.nll.detach().sum()), tokens + int(out.tokens.sum())
    assert evaluate(model, held, EvalConfig(decode_limit=0)).val_loss == pytest.approx(nats / tokens, rel=1e-5)


def test_audio_of_another_utterance_changes_the_loss(world, model):
    result = evaluate(model, open_data(world[2]).held_out, EvalConfig(decode_limit=0))
    assert result.audio_gain == result.val_loss_shuffled - result.val_loss
    assert result.audio_gain != 0
    assert (result.wer, result.cer, result.n_val) == (None, None, 6)


def test_one_utterance_alone_has_no_shuffled_loss(world, model):
    result = evaluate(model, open_data(world[2]).held_out.subset(1), EvalConfig(decode_limit=0))
    assert result.val_loss_shuffled is None
    assert result.audio_gain is None


def test_an_evaluation_does_not_change_modes_gradients_or_random_state(world, model):
    model.projector.train()
    before = torch.get_rng_state()
    evaluate(model, open_data(world[2]).held_out, EvalConfig(decode_limit=2, max_new_tokens=2))
    assert model.projector.training
    assert not model.lm.training
    assert torch.equal(before, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_an_evaluation_stops_when_asked(world, model):
    with pytest.raises(Stopped):
        evaluate(model, open_data(world[2]).held_out, stop=lambda: True)


def test_error_rates_are_corpus_rates_after_normalization():
    samples = [
        make_sample("a", "Mister Brown, it's COLOUR!", "mr brown it is color"),
        make_sample("b", "one two", "one"),
    ]
    assert samples[0].wer == 0
    wer, cer = error_rates([*samples, make_sample("c", "a b c d", "x b c d")])
    assert wer == pytest.approx(2 / 10)  # "one two" is one word, "12", and wrong; so is "a"
    assert cer is not None
    assert 0 < cer < 0.5


def test_references_that_are_empty_after_normalization_are_excluded():
    silent = make_sample("a", "[noise] um ...", "hello")
    assert silent.wer is None
    assert error_rates([silent]) == (None, None)
    assert error_rates([silent, make_sample("b", "yes", "yes")]) == (0.0, 0.0)


def test_evaluating_a_finished_run_returns_the_keys_of_its_summary(finished, world):
    summary = json.loads((finished / "summary.json").read_text())
    again = evaluate_run(finished, world[2])
    assert summary.keys() <= again.keys()
    for key in ("val_loss", "val_loss_shuffled", "audio_gain", "wer", "cer", "projector_rms_ratio"):
        assert again[key] == summary[key]
    assert again["n_val"] == 6


def test_only_held_out_rows_of_a_training_cache_are_evaluated(finished, world):
    assert evaluate_run(finished, world[2], str(world[1]))["n_val"] == 6
    copy = make_cache(world[0] / "other", 10, seed=3)
    assert evaluate_run(finished, world[2], str(copy))["n_val"] == 10


def test_a_cache_of_other_features_is_refused_with_the_field(finished, world):
    other = make_cache(world[0] / "layer3", 4, layer=3)
    with pytest.raises(UserError, match="layer: 3, not 2"):
        evaluate_run(finished, world[2], str(other))


def test_training_settings_cannot_be_changed_in_an_evaluation(finished, world):
    changed = world[2].model_copy(update={"val": world[2].val.model_copy(update={"fraction": 0.5})})
    with pytest.raises(UserError, match=r"val\.fraction: 0\.0, not 0\.5"):
        evaluate_run(finished, changed)


def test_a_run_that_is_not_finished_names_the_command_that_resumes_it(world, tmp_path):
    with pytest.raises(UserError, match="--resume"):
        evaluate_run(tmp_path, world[2])
