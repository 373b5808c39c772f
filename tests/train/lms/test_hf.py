from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from soft_tokens import AFTER, BEFORE, TARGETS, continued, generate_whole_rows, soft_batch
from tiny_lm import save_tiny_lm, save_tiny_tokenizer

from shards.errors import UserError
from train.lms.hf.model import load_hf
from train.lms.load import load_lm
from train.lms.packing import pack_inputs


def load(folder, *, dtype=torch.float32, train=False):
    return load_hf(folder, reference="tiny", identity="tiny", device="cpu", dtype=dtype, train=train)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_lm(tmp_path_factory.mktemp("lm") / "tiny")


@pytest.fixture(scope="module")
def lm(folder):
    return load(folder)


def reference_nats(lm, soft, mask, before, after, targets):
    """One row at a time through the model's own forward, every logit computed."""
    nats = []
    embed = lm.model.get_input_embeddings()
    for i, ids in enumerate(targets):
        parts = [embed(torch.tensor(before[i]).long()), soft[i][mask[i]], embed(torch.tensor([*after[i], *ids]).long())]
        logits = lm.model(inputs_embeds=torch.cat(parts)[None]).logits[0].float()
        nats.append(F.cross_entropy(logits[-len(ids) - 1 : -1], torch.tensor(ids), reduction="sum"))
    return torch.stack(nats)


@pytest.mark.parametrize("pad", ["left", "right"])
def test_rows_are_packed_without_gaps_and_padded_on_one_side(pad):
    layout = pack_inputs(torch.tensor([3, 1, 4]), BEFORE, AFTER, TARGETS, pad=pad)
    for i in range(3):
        inputs = [*BEFORE[i], *[0] * [3, 1, 4][i], *AFTER[i], *TARGETS[i][:-1]]
        columns = layout.valid[i].nonzero()[:, 0]
        assert layout.ids[i][layout.valid[i]].tolist() == inputs
        assert columns.tolist() == list(range(columns[0], columns[0] + len(inputs)))
        assert columns[0] == 0 if pad == "right" else columns[-1] == layout.ids.shape[1] - 1
        assert layout.last_positions[i] == columns[-1]
        assert layout.predicts_target[i].nonzero()[:, 0].tolist() == columns[-len(TARGETS[i]) :].tolist()
    assert layout.targets.tolist() == [20, 21, 2, 22, 2, 2]
    assert layout.is_soft.sum(1).tolist() == [3, 1, 4]


def test_a_row_without_soft_tokens_and_prompt_is_rejected():
    with pytest.raises(ValueError, match="nothing to predict"):
        pack_inputs(torch.tensor([0]), [[]], [[]], [[2]])


def test_batched_nats_equal_a_row_by_row_reference(lm):
    soft, mask = soft_batch()
    expected = reference_nats(lm, soft, mask, BEFORE, AFTER, TARGETS)
    torch.testing.assert_close(lm.target_nll(soft, mask, BEFORE, AFTER, TARGETS), expected, rtol=1e-5, atol=1e-5)


def test_gradients_reach_valid_soft_tokens_and_nothing_of_a_frozen_model(lm):
    soft, mask = soft_batch()
    soft.requires_grad_()
    lm.target_nll(soft, mask, BEFORE, AFTER, TARGETS).sum().backward()
    reached = soft.grad.abs().sum(-1) > 0
    assert torch.equal(reached, mask)
    assert all(p.grad is None for p in lm.parameters())


def test_a_frozen_model_stays_in_eval_when_its_owner_trains(lm, folder):
    assert not lm.train().training
    assert not lm.model.training
    assert load(folder, train=True).train().training


def test_cached_batched_generation_equals_uncached_argmax_of_single_rows(lm):
    soft, mask = soft_batch(seed=3)
    got = lm.generate(soft, mask, BEFORE, AFTER, 12)
    for i in range(3):
        ids: list[int] = []
        embed = lm.model.get_input_embeddings()
        while len(ids) < 12:
            tail = torch.tensor([*AFTER[i], *ids]).long()
            x = torch.cat([embed(torch.tensor(BEFORE[i]).long()), soft[i][mask[i]], embed(tail)])[None]
            token = int(lm.model(inputs_embeds=x).logits[0, -1].argmax())
            if token == lm.tokenizer.eos:
                break
            ids.append(token)
        assert got[i] == ids
    assert any(got)


def test_rows_that_continue_others_are_those_of_whole_rows(lm):
    for own, whole in zip(continued(lm), continued(lm, whole=True), strict=True):
        torch.testing.assert_close(own, whole, rtol=1e-4, atol=1e-4)


def test_decoding_multiplies_one_row_per_utterance_and_does_not_copy_the_output_matrix(lm):
    soft, mask = soft_batch()
    seen: list[torch.Size] = []
    handle = lm.model.get_output_embeddings().register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    with handle:
        lm.generate(soft, mask, BEFORE, AFTER, 2)
    assert seen == [(3, lm.width), (3, lm.width)]


def test_generation_ends_each_row_at_its_own_eos(lm):
    soft, mask = soft_batch()
    free = lm.generate(soft, mask, BEFORE, AFTER, 8)
    ends, lm.tokenizer.ends = lm.tokenizer.ends, frozenset({free[0][3]})
    try:
        stopped = lm.generate(soft, mask, BEFORE, AFTER, 8)
    finally:
        lm.tokenizer.ends = ends
    for row, full in zip(stopped, free, strict=True):
        assert row == (full[: full.index(free[0][3])] if free[0][3] in full else full)
    assert lm.generate(soft, mask, BEFORE, AFTER, 0) == [[], [], []]


def test_embedding_rms_is_that_of_the_table(lm):
    table = lm.model.get_input_embeddings().weight
    assert lm.embedding_rms == pytest.approx(table.square().mean().sqrt().item(), rel=1e-5)
    assert lm.width == 32


def test_bfloat16_runs_near_float32(folder, lm):
    soft, mask = soft_batch()
    half = load(folder, dtype=torch.bfloat16)
    nats = half.target_nll(soft.bfloat16(), mask, BEFORE, AFTER, TARGETS)
    assert nats.dtype == torch.float32
    torch.testing.assert_close(nats, lm.target_nll(soft, mask, BEFORE, AFTER, TARGETS), rtol=0.05, atol=0.05)


def test_float32_attention_changes_a_bfloat16_model_no_more_than_rounding_does(folder):
    soft, mask = soft_batch()
    half = load(folder, dtype=torch.bfloat16)
    assert half.model.config._attn_implementation == "sdpa_float32"
    fast = half.target_nll(soft.bfloat16(), mask, BEFORE, AFTER, TARGETS)
    assert len(half.generate(soft.bfloat16(), mask, BEFORE, AFTER, 3)) == 3
    half.model.set_attn_implementation("sdpa")
    plain = half.target_nll(soft.bfloat16(), mask, BEFORE, AFTER, TARGETS)
    torch.testing.assert_close(fast, plain, rtol=0.03, atol=0.03)


def test_a_training_model_keeps_float32_masters_and_gets_gradients(folder):
    lm = load(folder, dtype=torch.bfloat16, train=True)
    soft, mask = soft_batch()
    lm.target_nll(soft.bfloat16(), mask, BEFORE, AFTER, TARGETS).sum().backward()
    assert {p.dtype for p in lm.parameters()} == {torch.float32}
    assert all(p.grad is not None for p in lm.parameters())
    assert lm.generate(soft.bfloat16(), mask, BEFORE, AFTER, 2)


def test_tokens_round_trip_and_special_tokens_count_only_in_prompts(lm):
    ids = lm.tokenizer.encode("seven o'clock, é")
    assert lm.tokenizer.decode([*ids, lm.tokenizer.eos]) == "seven o'clock, é"
    assert lm.tokenizer.encode("<|im_end|>", special=True) == [2]
    assert 2 not in lm.tokenizer.encode("<|im_end|>")


def test_logits_of_a_softcapped_family_are_softcapped(tmp_path):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=259, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, initializer_range=0.5, final_logit_softcapping=3.0, eos_token_id=2,
    )  # fmt: skip
    lm = load(save_tiny_lm(tmp_path / "gemma", model=Gemma2ForCausalLM(config)))
    soft, mask = soft_batch()
    expected = reference_nats(lm, soft, mask, BEFORE, AFTER, TARGETS)
    torch.testing.assert_close(lm.target_nll(soft, mask, BEFORE, AFTER, TARGETS), expected, rtol=1e-4, atol=1e-4)


def gemma(kind):
    """A tiny random model of a family that scales its embeddings by the root of its width."""
    import transformers

    config = getattr(transformers, {"gemma3": "Gemma3TextConfig"}.get(kind, f"{kind.title()}Config"))(
        vocab_size=259, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, initializer_range=0.3, eos_token_id=2, pad_token_id=0, sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
    ) if kind != "gemma" else transformers.GemmaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, initializer_range=0.3, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.fixture(scope="module", params=["gemma", "gemma2", "gemma3"])
def scaled(request, tmp_path_factory):
    return load(save_tiny_lm(tmp_path_factory.mktemp("lm") / request.param, model=gemma(request.param)))


def test_soft_tokens_equal_to_scaled_embeddings_act_as_those_tokens(scaled):
    ids = [[30, 31, 32, 33, 34, 35], [40], [50, 51]]
    with torch.no_grad():
        rows = [scaled.model.get_input_embeddings()(torch.tensor(row)) for row in ids]
    mask = torch.arange(6) < torch.tensor([6, 1, 2])[:, None]
    soft = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    as_text = [[*b, *row] for b, row in zip(BEFORE, ids, strict=True)]
    expected = scaled.target_nll(soft[:, :0], mask[:, :0], as_text, AFTER, TARGETS)
    torch.testing.assert_close(scaled.target_nll(soft, mask, BEFORE, AFTER, TARGETS), expected, rtol=1e-4, atol=1e-4)
    for i, row in enumerate(as_text):
        whole = torch.tensor([*row, *AFTER[i], *TARGETS[i]])
        logits = scaled.model(input_ids=whole[None]).logits[0, -len(TARGETS[i]) - 1 : -1]
        torch.testing.assert_close(
            expected[i], F.cross_entropy(logits, whole[-len(TARGETS[i]) :], reduction="sum"), rtol=1e-4, atol=1e-4
        )


def test_an_output_norm_starts_at_the_rms_of_the_scaled_embeddings(scaled):
    table = scaled.model.get_input_embeddings().weight
    assert scaled.embedding_rms == pytest.approx(32**0.5 * table.square().mean().sqrt().item(), rel=1e-4)


def test_cached_generation_of_a_sliding_window_family_equals_uncached(scaled):
    soft, mask = soft_batch(lengths=(9, 1, 6))
    assert scaled.generate(soft, mask, BEFORE, AFTER, 8) == generate_whole_rows(scaled, soft, mask, BEFORE, AFTER, 8)


def assert_candidates_cost_as_much_as_alone(lm):
    soft, candidates = (
        0.3 * torch.randn(9, 32, generator=torch.Generator().manual_seed(1)),
        [[4, 5, 6, 7, 8], [9], [9, 3]],
    )
    found = lm.candidate_nll(soft, [30, 31], [7], candidates)
    mask = torch.ones(1, 9, dtype=torch.bool)
    for nats, ids in zip(found, candidates, strict=True):
        alone = lm.target_nll(soft[None], mask, [[30, 31]], [[7]], [ids])[0]
        torch.testing.assert_close(nats, alone, rtol=1e-4, atol=1e-4)


def test_candidates_share_the_keys_and_values_of_a_sliding_window_family(scaled):
    assert_candidates_cost_as_much_as_alone(scaled)


def multiplied(kind):
    """A tiny random model of a family that multiplies its logits, its embeddings or both by factors of its config."""
    import transformers

    keys = {
        "Granite": {"logits_scaling": 8.0, "embedding_multiplier": 6.0},
        "Cohere": {"logit_scale": 0.25},
        "HyperCLOVAX": {"logits_scaling": 0.25, "embedding_multiplier": 6.0},
        "FalconH1": {
            "lm_head_multiplier": 0.5, "embedding_multiplier": 6.0, "mamba_d_ssm": 32, "mamba_n_heads": 4,
            "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8,
        },
    }[kind]  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=259, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=0.3, eos_token_id=2, pad_token_id=0, **keys,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("kind", ["Granite", "Cohere", "HyperCLOVAX", "FalconH1"])
def test_a_family_that_scales_logits_or_embeddings_keeps_its_own_logits(tmp_path, kind):
    lm = load(save_tiny_lm(tmp_path / kind, model=multiplied(kind)))
    ids, none = [[5, 6, 7], [8], [9, 10]], torch.zeros(3, 0, dtype=torch.bool)
    nats = lm.target_nll(torch.zeros(3, 0, 32), none, ids, AFTER, TARGETS)
    for i, text in enumerate(ids):
        whole = torch.tensor([*text, *AFTER[i], *TARGETS[i]])
        logits = lm.model(input_ids=whole[None]).logits[0, -len(TARGETS[i]) - 1 : -1].float()
        expected = F.cross_entropy(logits, whole[-len(TARGETS[i]) :], reduction="sum")
        torch.testing.assert_close(nats[i], expected, rtol=1e-4, atol=1e-4)
    if kind == "FalconH1":  # of ids alone: a soft token must be as large as a multiplied row
        table = lm.model.get_input_embeddings().weight
        assert lm.embedding_rms == pytest.approx(6 * table.square().mean().sqrt().item(), rel=1e-4)
    soft, mask = soft_batch()
    assert lm.generate(soft, mask, BEFORE, AFTER, 4) == generate_whole_rows(lm, soft, mask, BEFORE, AFTER, 4)
    assert_candidates_cost_as_much_as_alone(lm)  # FalconH1 has a recurrent state


def test_a_family_with_an_unknown_step_before_its_logits_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr("train.lms.hf.scales._logit_factors", lambda config: [1.0])
    with pytest.raises(UserError, match=r"GraniteForCausalLM.*choose another"):
        load(save_tiny_lm(tmp_path / "granite", model=multiplied("Granite")))


def test_a_folder_without_a_model_is_reported_in_one_sentence(tmp_path):
    with pytest.raises(UserError, match="cannot be loaded as a causal language model"):
        load(tmp_path)


def test_a_tokenizer_without_eos_is_rejected(folder, tmp_path):
    import shutil

    other = tmp_path / "no-eos"
    shutil.copytree(folder, other)
    save_tiny_tokenizer(other, eos=None)
    for name in ("config.json", "generation_config.json"):
        tree = json.loads((other / name).read_text())
        (other / name).write_text(json.dumps(tree | {"eos_token_id": None}))
    with pytest.raises(UserError, match="has an end-of-sequence token"):
        load(other)


def test_a_reference_to_a_folder_is_loaded_with_its_identity(folder):
    lm = load_lm(f"path:{folder}", device="cpu", dtype=torch.float32)
    assert lm.reference == f"path:{folder}"
    assert lm.identity == load_lm(f"path:{folder}", device="cpu", dtype=torch.bfloat16).identity
    assert lm.identity.startswith("sha256:")
    assert not lm.trainable
