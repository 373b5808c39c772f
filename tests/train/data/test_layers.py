"""Runs on several layers of one corpus: caches joined by key, a learned mix in front of the projector."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from launch import finish, torchrun
from tiny_cache import make_cache, without
from tiny_run import forget_after, losses, make_config, write_config

from shards.errors import UserError
from shards.read.cache import Cache
from shards.stream.iterable_dataset import FeatureStream
from shards.stream.sampler import SamplerConfig
from train.config.train import TrainConfig
from train.data.caches import missing_extractions, open_data
from train.data.layers import LayeredCaches
from train.data.loader import LayeredStream
from train.evaluation.run import evaluate_run
from train.model.build import load_model
from train.runs.folder import run_config
from train.trainer.fit import fit

KEYS = {"projector": {"kind": "mlp", "stack": 4, "norm": "rms"}, "checkpoint_every": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Layers 2, 4 and 6 of one corpus; the features of layer 6 are rounded, and it lacks an utterance."""
    folder = tmp_path_factory.mktemp("layers")
    make_cache(folder / "L2", 16, layer=2, val_every=4)
    make_cache(folder / "L4", 16, layer=4, val_every=4)
    without(make_cache(folder / "L6", 16, layer=6, val_every=4, codec="int8"), "utt-00004")
    return folder


def opened(folder, *names):
    return [Cache.open(folder / name) for name in names]


def test_channels_of_all_layers_are_concatenated_for_utterances_in_all_caches(folder):
    caches = opened(folder, "L2", "L4", "L6")
    layers = LayeredCaches([caches])
    assert (layers.count, layers.channels) == (3, 8)
    assert np.flatnonzero(~layers.in_all_layers).tolist() == [4]
    for row in np.flatnonzero(layers.in_all_layers).tolist():
        x = layers.features(row)
        assert x.dtype == np.float32
        key = caches[0].row(row)["key"]
        for place, cache in enumerate(caches):
            theirs = cache.manifest["key"].to_pylist().index(key)
            assert np.array_equal(x[:, 8 * place : 8 * place + 8], cache.features(theirs).astype(np.float32))
    with pytest.raises(IndexError):
        layers.features(4)


def test_a_stream_of_layers_has_the_order_and_the_state_of_the_first_caches(folder, tmp_path):
    make_cache(tmp_path / "L2", 6, layer=2, seed=3, prefix="other")
    make_cache(tmp_path / "L6", 6, layer=6, seed=3, prefix="other", codec="int8")
    corpora = [opened(folder, "L2", "L6"), opened(tmp_path, "L2", "L6")]
    layers, rules = LayeredCaches(corpora), SamplerConfig(batch_size=4)
    rows = np.flatnonzero(layers.in_all_layers)

    def stream():
        return FeatureStream([caches[0] for caches in corpora], rules, 0, rows=rows, epochs=1)

    plain, wide = stream(), LayeredStream(stream(), layers)
    assert wide.state_dict() == plain.state_dict()
    seen = 0
    for one, two in zip(plain, wide, strict=True):
        assert (one.keys, one.index, plain.state_dict()) == (two.keys, two.index, wide.state_dict())
        assert torch.equal(one.features.float(), two.features[..., :8])
        for slot, row, frames in zip(two.features, two.rows, two.lengths.tolist(), strict=True):
            assert np.array_equal(slot[:frames].numpy(), layers.features(row))
            assert not slot[frames:].any()
            seen += 1
    assert seen == 15 + 6
    stopped = LayeredStream(stream(), layers)
    batches = iter(stopped)
    taken = [next(batches).keys for _ in range(2)]
    batches.close()
    again = LayeredStream(stream(), layers)
    again.load_state_dict(stopped.state_dict())
    assert [*taken, *(batch.keys for batch in again)] == [batch.keys for batch in stream()]


def test_a_run_on_equal_layers_equals_the_run_on_one_and_resumes_and_evaluates(folder, tmp_path):
    """Weights that sum to one do not change a mix of equal layers, so the losses are those of the run on one layer."""
    caches = [[str(folder / "L2"), str(folder / "L4")]]
    config = make_config(tmp_path / "mixed", "", "nanochat:d1", **KEYS, caches=caches)
    mixed = fit(config)
    plain = fit(make_config(tmp_path / "plain", folder / "L2", "nanochat:d1", **KEYS))
    assert losses(mixed) == pytest.approx(losses(plain), rel=1e-4)
    one, two = (json.loads((run / "summary.json").read_text()) for run in (plain, mixed))
    assert two["val_loss"] == pytest.approx(one["val_loss"], rel=1e-3)
    assert two["layer_weights"] == pytest.approx([0.5, 0.5], abs=0.05)
    assert two["trained_parameters"] == one["trained_parameters"] + 2
    about = json.loads((mixed / "caches.json").read_text())
    assert [spec["layer"] for spec in about["layers"]] == [2, 4]
    whole = losses(mixed)
    forget_after(mixed, 4)
    other = make_config(tmp_path / "mixed", "", "nanochat:d1", **KEYS, caches=[[caches[0][0], str(folder / "L6")]])
    with pytest.raises(UserError, match=r"the layers of .* changed"):
        fit(other, mixed)
    assert losses(fit(config, mixed)) == whole
    judged = evaluate_run(mixed, run_config(mixed), ",".join(caches[0]))
    assert judged["val_loss"] == pytest.approx(two["val_loss"])
    with pytest.raises(UserError, match="uses 2 layers and --cache names 1"):
        evaluate_run(mixed, run_config(mixed), caches[0][0])


def test_a_mixer_trains_with_any_projector_and_skips_utterances_that_a_layer_lacks(folder, tmp_path):
    caches = [[str(folder / name) for name in ("L2", "L4", "L6")]]
    keys = {"projector": {"kind": "qformer", "window": 4}, "normalise_layers": True, "lr": 0.1, "frame_mask_prob": 0.1}
    config = make_config(tmp_path, "", "nanochat:d1", caches=caches, **keys)
    data = open_data(config)
    assert (len(data.train_rows), len(data.held_out)) == (12, 3)
    assert 4 not in data.held_out.rows
    model = load_model(fit(config), config, torch.device("cpu"), torch.float32)
    weights = model.projector.summary()["layer_weights"]
    assert sum(weights) == pytest.approx(1)
    assert max(weights) - min(weights) > 0.01
    assert model.projector.mixer.normalize


@pytest.mark.slow
def test_two_processes_train_on_layers_as_one_does(folder, tmp_path):
    keys = {**KEYS, "caches": [[str(folder / "L2"), str(folder / "L6")]], "eval_batch_size": 2}
    alone = fit(make_config(tmp_path / "alone", "", "nanochat:d1", **keys))
    config = make_config(tmp_path, "", "nanochat:d1", **keys)
    finish(torchrun(2, "--config", write_config(tmp_path / "c.yaml", config)))
    assert losses(tmp_path / "runs" / "run") == pytest.approx(losses(alone), rel=1e-5)


def test_incompatible_layers_are_rejected(folder, tmp_path):
    make_cache(tmp_path / "wide", 16, layer=4, channels=6)
    make_cache(tmp_path / "o2", 4, layer=2, prefix="other")
    make_cache(tmp_path / "o4", 4, layer=4, prefix="other")
    two, four = opened(folder, "L2", "L4")
    with pytest.raises(UserError, match=r"6 channels .* mixed layers must have the same number"):
        LayeredCaches([[two, *opened(tmp_path, "wide")]])
    with pytest.raises(UserError, match="in the same order"):
        LayeredCaches([[two, four], opened(tmp_path, "o4", "o2")])


def test_a_config_lists_the_same_number_of_layers_for_each_corpus(tmp_path):
    with pytest.raises(ValueError, match="entries of 1 and 2 layers"):
        TrainConfig.model_validate({"caches": [["a", "b"], "c"]})
    with pytest.raises(ValueError, match="needs several layers"):
        TrainConfig.model_validate({"caches": "a", "normalise_layers": True})
    here = make_cache(tmp_path / "here", 4)
    entries = [[str(here), str(tmp_path / "gone")], [str(tmp_path / "x"), str(tmp_path / "y")]]
    config = TrainConfig.model_validate({"caches": entries, "extract": ["one.yaml", "two.yaml"]})
    assert missing_extractions(config) == ["one.yaml", "two.yaml"]
    assert config.layers == 2
