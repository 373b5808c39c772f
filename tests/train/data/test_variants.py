"""Runs on utterances with variants: training draws them, held-out utterances are untouched."""

from __future__ import annotations

import json
from itertools import islice

import numpy as np
import pytest
from tiny_run import forget_after, losses, make_config
from tiny_variants import make_varied, varied_features

from shards.errors import UserError
from shards.format.variants import variant_key
from shards.stream.iterable_dataset import FeatureStream
from shards.stream.sampler import SamplerConfig
from train.data.caches import open_data
from train.data.layers import LayeredCaches
from train.data.loader import LayeredStream, open_stream
from train.distributed.group import ProcessGroup
from train.sweeps.group import group_key
from train.trainer.fit import fit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("varied")
    for layer in (2, 4):
        make_varied(folder / f"L{layer}", 16, 3, layer=layer, val_every=4)
    make_varied(folder / "plain", 16, 1, val_every=4)
    return folder


def test_training_draws_variants_and_held_out_utterances_are_untouched(folder, tmp_path):
    config = make_config(tmp_path, folder / "L2", "nanochat:d1")
    data = open_data(config)
    assert (len(data.train_rows), len(data.held_out)) == (12, 4)
    assert any("one of up to 3 versions of each utterance" in note for note in data.notes)
    for index, key in enumerate(data.held_out.columns("key")["key"]):
        x = data.held_out.features(index)
        assert np.array_equal(x, varied_features()(key, len(x)).astype(np.float16))
    held_out = set(data.held_out.columns("key")["key"])
    batches = iter(open_stream(config, data, ProcessGroup()))
    seen = {pair for batch in islice(batches, 90) for pair in zip(batch.keys, batch.variants, strict=True)}
    assert len(seen) == 12 * 3
    assert not {key for key, _ in seen} & held_out


def test_a_run_that_is_resumed_reads_the_variants_of_one_that_never_stopped(folder, tmp_path):
    config = make_config(tmp_path, folder / "L2", "nanochat:d1", checkpoint_every=4)
    run = fit(config)
    whole = losses(run)
    assert json.loads((run / "caches.json").read_text())["caches"][0]["variants"] == 32
    forget_after(run, 4)
    assert losses(fit(config, run)) == whole
    assert "16 utterances and 32 variants of them" in (run / "report.html").read_text()


def test_a_run_without_variants_is_the_run_on_a_cache_that_has_none(folder, tmp_path):
    one = fit(make_config(tmp_path / "one", folder / "plain", "nanochat:d1"))
    two = fit(make_config(tmp_path / "two", folder / "L2", "nanochat:d1", variants=1))
    assert losses(one) == losses(two)


def test_a_run_is_not_resumed_with_other_variants(folder, tmp_path):
    config = make_config(tmp_path, folder / "L2", "nanochat:d1", checkpoint_every=4)
    run = fit(config)
    forget_after(run, 4)
    with pytest.raises(UserError, match=r"variants|versions"):
        fit(config.model_copy(update={"variants": 2}), run)


def test_experiments_that_read_other_variants_do_not_share_their_batches(folder, tmp_path):
    config = make_config(tmp_path, folder / "L2", "nanochat:d1")
    assert group_key(config) == group_key(config.model_copy(update={"lr": 1.0}))
    assert group_key(config) != group_key(config.model_copy(update={"variants": 1}))


def test_all_layers_of_a_batch_are_of_the_same_variant(folder):
    from shards.read.cache import Cache

    layers = LayeredCaches([[Cache.open(folder / name) for name in ("L2", "L4")]])
    stream = FeatureStream([layers.joined[0].caches[0]], SamplerConfig(batch_size=4), 0, epochs=3)
    for batch in LayeredStream(stream, layers):
        for i, (key, number) in enumerate(zip(batch.keys, batch.variants, strict=True)):
            length = int(batch.lengths[i])
            x = varied_features()(variant_key(key, number), length).astype(np.float16)
            assert np.array_equal(batch.features[i, :length].numpy(), np.concatenate([x, x], axis=1))
