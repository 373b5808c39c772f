"""Runs on caches of integer codes: learned embeddings in front of any projector."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_cache import CODEBOOK_SIZE, make_cache
from tiny_lm import save_tiny_lm
from tiny_projectors import CONFIGS
from tiny_run import forget_after, losses, make_config
from tiny_sweep import make_sweep

from shards.errors import UserError
from shards.stream.batch import Batch
from train.config.model import AugmentConfig
from train.data.loader import NO_CODE, augment
from train.inference.export import export, load_projector
from train.model.build import load_model
from train.probes.data import open_layers
from train.projectors import build_projector, embed_codes, standalone
from train.projectors.codes import CodeEmbedding
from train.projectors.ctc import HeadTokens
from train.sweeps.sweep import run_sweep
from train.trainer.fit import fit


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return save_tiny_lm(tmp_path_factory.mktemp("lm"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("cache") / "codes", 20, 4, codec="u16", val_every=5)


def embedding(codebooks: int = 4, dim: int = 12) -> CodeEmbedding:
    made = CodeEmbedding(codebooks, CODEBOOK_SIZE, dim)
    made.init_weights(torch.Generator().manual_seed(0))
    return made


def some_codes(*shape: int) -> torch.Tensor:
    return torch.randint(0, CODEBOOK_SIZE, shape, generator=torch.Generator().manual_seed(1), dtype=torch.int32)


def test_a_frame_is_the_sum_of_the_embeddings_of_its_codes_and_padding_is_zero():
    embed, codes, mask = embedding(), some_codes(2, 5, 4), torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    found = embed(codes, mask)
    for b in range(2):
        for t in range(5):
            parts = [embed.table[k, int(codes[b, t, k])] for k in range(4)]
            assert torch.allclose(found[b, t], sum(parts) if mask[b, t] else torch.zeros(12), atol=1e-6)
    assert 0.8 < float(found[0].detach().square().mean().sqrt()) < 1.2


def test_a_code_of_minus_one_adds_nothing_and_floats_are_refused():
    embed, codes, mask = embedding(), some_codes(1, 3, 4), torch.ones(1, 3, dtype=torch.bool)
    codes[0, 1] = NO_CODE
    assert not embed(codes, mask)[0, 1].any()
    with pytest.raises(ValueError, match="expected integer codes of 4 codebooks"):
        embed(codes.float(), mask)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
def test_every_kind_of_projector_reads_codes_and_a_row_does_not_depend_on_its_batch(config):
    tokens = HeadTokens.placeholder(5, 16)
    projector = embed_codes(build_projector(config, 12, 16, 0.1, head_tokens=tokens), 4, CODEBOOK_SIZE, 12).eval()
    codes, mask = some_codes(2, 40, 4), torch.ones(2, 40, dtype=torch.bool)
    mask[1, 23:] = False
    soft, soft_mask = projector(codes, mask)
    codes[1, 23:] = 7
    alone, alone_mask = projector(codes[1:, :23], mask[1:, :23])
    count = int(alone_mask.sum())
    assert int(soft_mask[1].sum()) == count
    torch.testing.assert_close(soft[1, :count], alone[0, :count], atol=1e-5, rtol=1e-5)


def test_a_run_on_codes_trains_its_embeddings_and_resumes_bit_by_bit(tmp_path, lm, cache):
    config = make_config(tmp_path, cache, str(lm), code_dim=12, checkpoint_every=4, frame_mask_prob=0.1)
    run = fit(config)
    whole = losses(run)
    model = load_model(run, config, torch.device("cpu"), torch.float32)
    start = embedding(4, 12)
    assert not torch.equal(model.projector.embedding.table, start.table)
    forget_after(run, 4)
    fit(config, resume=run)
    assert losses(run) == whole


def test_an_export_of_a_run_on_codes_computes_the_same_bits(tmp_path, lm, cache):
    config = make_config(tmp_path, cache, str(lm), code_dim=12, eval_every=0, steps=2)
    run = fit(config)
    projector = load_model(run, config, torch.device("cpu"), torch.float32).projector
    folder = export(run, tmp_path / "export")
    codes, mask = some_codes(1, 17, 4), torch.ones(1, 17, dtype=torch.bool)
    for loaded in (load_projector(folder), standalone.load(folder)):
        assert torch.equal(projector(codes, mask)[0], loaded(codes, mask)[0])
    assert "integer codes [B, frames, 4]" in (tmp_path / "export" / "README.md").read_text()


def test_bfloat16_activations_keep_codes_above_256_apart(tmp_path, lm, cache):
    from train.model.build import build_model

    config = make_config(tmp_path, cache, str(lm), code_dim=12, dtype="bfloat16")
    device = torch.device("cpu")
    model = build_model(config, 4, device, torch.bfloat16, codebook_size=CODEBOOK_SIZE)
    mask = torch.ones(1, 4, dtype=torch.bool)
    one, other = (torch.full((1, 4, 4), code, dtype=torch.int32) for code in (256, 257))
    found = [model.soft_tokens(codes, mask)[0] for codes in (one, other)]
    assert found[0].dtype == torch.bfloat16
    assert not torch.equal(*found)


@pytest.mark.parametrize("lockstep", ["separate", "batched"])
def test_experiments_in_lockstep_on_codes_are_single_runs(tmp_path, lm, cache, lockstep):
    experiments = [{"name": "mlp"}, {"name": "linear", "projector": {"kind": "linear", "stack": 4}, "lr": 3e-3}]
    base = {"code_dim": 12, "steps": 3}
    folder = run_sweep(make_sweep(tmp_path, cache, str(lm), base, experiments=experiments, lockstep=lockstep))
    alone = make_config(
        tmp_path, cache, str(lm), **base, data_seed=7, eval_every=0, projector=experiments[1]["projector"], lr=3e-3
    )
    np.testing.assert_allclose(
        losses(folder / "linear"), losses(fit(alone)), rtol=0 if lockstep == "separate" else 1e-5
    )


def test_one_experiment_that_cannot_change_codes_is_refused(tmp_path, lm, cache):
    experiments = [{"name": "plain"}, {"name": "noisy", "noise_std": 0.1}]
    with pytest.raises(UserError, match=r"noise_std=0\.1 changes values of features"):
        run_sweep(make_sweep(tmp_path, cache, str(lm), experiments=experiments))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"noise_std": 0.1}, "noise_std=0.1 changes values of features"),
        ({"augment": {"speed": 0.1}}, "augment.speed=0.1 changes"),
        ({"augment": {"channel_masks": 1}}, "augment.channel_masks=1 changes"),
    ],
)
def test_changes_that_codes_cannot_have_are_refused_before_the_run_exists(tmp_path, lm, cache, keys, message):
    with pytest.raises(UserError, match=message):
        fit(make_config(tmp_path, cache, str(lm), **keys))
    assert not (tmp_path / "runs" / "run").exists()


def test_masked_frames_become_no_code_and_silence_is_made_of_the_codes():
    codes = some_codes(1, 40, 4)
    batch = Batch(codes, torch.tensor([40]), ["a"], ["text"], [""], [""], [0], 0, 0, {})
    masked = augment(batch, 0, 0.0, 0.0, AugmentConfig(time_masks=1, time_mask_frames=5)).features
    gone = (masked == NO_CODE).all(-1)
    assert masked.dtype == torch.int32
    assert 1 <= int(gone.sum()) <= 5
    assert torch.equal(masked[~gone], codes[~gone])
    assert (augment(batch, 0, 1.0, 0.0).features == NO_CODE).all()
    silent = augment(batch, 0, 0.0, 0.0, AugmentConfig(silence=0.999))
    assert silent.texts == [""]
    assert {tuple(row) for row in silent.features[0].tolist()} <= {tuple(row) for row in codes[0].tolist()}


def test_codes_are_neither_mixed_as_layers_nor_probed(tmp_path, lm, cache):
    other = make_cache(tmp_path / "other", 20, 4, codec="u16", val_every=5, layer=1)
    with pytest.raises(UserError, match="holds the integer codes of whisper, which cannot be mixed as a layer"):
        fit(make_config(tmp_path, cache, str(lm), caches=[[str(cache), str(other)]]))
    with pytest.raises(UserError, match="which cannot be probed"):
        open_layers([str(cache)], None, 10, 0)


def test_silence_of_a_codec_that_is_not_here_is_no_code(lm, cache):
    from train.data.caches import open_utterances
    from train.distributed.group import ProcessGroup
    from train.evaluation.silence import encode_silence

    silence = encode_silence(open_utterances([str(cache)]), "cpu", ProcessGroup())
    assert silence.features.dtype == np.int32
    assert (silence.features == NO_CODE).all()
    assert silence.source.startswith("no codes: ")
