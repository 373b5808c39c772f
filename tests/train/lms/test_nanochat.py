from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from soft_tokens import continued, generate_whole_rows

from shards.errors import UserError
from train.config.model import LmConfig
from train.lms.load import load_lm
from train.lms.nanochat.config import EARLY_MARCH, FIRST, TODAY, Generation, GPTConfig
from train.lms.nanochat.gpt import GPT
from train.lms.nanochat.layers import windowed_attention
from train.lms.nanochat.model import NanochatLanguageModel
from train.lms.nanochat.tokenizers import ByteTokenizer
from train.lms.packing import pack_inputs

BEFORE, AFTER, TARGETS = [[], [], []], [[256], [256, 40], [256]], [[104, 105, 256], [97, 256], [256]]


def shaken(
    config: GPTConfig, *, train: bool = False, seed: int = 0, generation: Generation = TODAY
) -> NanochatLanguageModel:
    """A nanochat whose zero-initialized parts are not zero, so that every path has an effect."""
    gpt = GPT(config, generation)
    gpt.init_weights(seed)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.add_(torch.empty_like(parameter).normal_(0, 0.1, generator=generator))
    return NanochatLanguageModel(gpt, ByteTokenizer(), "nanochat:test", "test", torch.float32, train)


@pytest.fixture(scope="module")
def lm() -> NanochatLanguageModel:
    return shaken(GPTConfig(sequence_len=16, n_layer=3, n_head=4, n_kv_head=2, n_embd=32))


def soft_batch(width: int = 32, lengths: tuple[int, ...] = (3, 1, 4)) -> tuple[torch.Tensor, torch.Tensor]:
    soft = torch.randn(len(lengths), max(lengths), width, generator=torch.Generator().manual_seed(0))
    return soft, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def literal_logits(gpt: GPT, audio: torch.Tensor, ids: list[int]) -> torch.Tensor:
    """The published equations for one row, position by position and head by head, from the state dict alone."""
    c, w = gpt.config, gpt.state_dict()
    d, group = c.n_embd // c.n_head, c.n_head // c.n_kv_head

    def rms(x: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    text = rms(w["transformer.wte.weight"][ids])
    smeared = [text[0]]
    for t in range(1, len(ids)):
        gate = torch.sigmoid(w["smear_gate.weight"] @ text[t][:24])
        smeared.append(text[t] + w["smear_lambda"] * gate * text[t - 1])
    x = torch.cat([rms(audio), torch.stack(smeared)])
    tokens = [0] * len(audio) + ids
    total, x0, kept = len(tokens), x, x
    short = -(-c.sequence_len // 4 // 128) * 128
    for i in range(c.n_layer):
        window = c.sequence_len if c.window_pattern[i % 4] == "L" or i == c.n_layer - 1 else short
        p = f"transformer.h.{i}."
        x = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * x0
        n = rms(x)
        q, k, v = (n @ w[p + f"attn.c_{name}.weight"].T for name in "qkv")
        q, k, v = q.view(total, c.n_head, d), k.view(total, c.n_kv_head, d), v.view(total, c.n_kv_head, d)
        if i % 2 == (c.n_layer - 1) % 2:
            ve = w[f"value_embeds.{i}.weight"][tokens].view(total, c.n_kv_head, d)
            v = v + 3 * torch.sigmoid(n[:, :12] @ w[p + "attn.ve_gate.weight"].T)[..., None] * ve
        theta = torch.arange(total)[:, None] * 100000.0 ** (-torch.arange(0, d, 2) / d)
        cos, sin = theta.cos()[:, None], theta.sin()[:, None]

        def turn(y: torch.Tensor, cos: torch.Tensor = cos, sin: torch.Tensor = sin) -> torch.Tensor:
            y1, y2 = y[..., : d // 2], y[..., d // 2 :]
            return 1.2 * rms(torch.cat([y1 * cos + y2 * sin, -y1 * sin + y2 * cos], -1))

        q, k, out = turn(q), turn(k), torch.zeros(total, c.n_head, d)
        for h in range(c.n_head):
            for t in range(total):
                low = max(0, t - window)
                weights = (k[low : t + 1, h // group] @ q[t, h] / d**0.5).softmax(0)
                out[t, h] = weights @ v[low : t + 1, h // group]
        x = x + out.reshape(total, -1) @ w[p + "attn.c_proj.weight"].T
        x = x + F.relu(rms(x) @ w[p + "mlp.c_fc.weight"].T).square() @ w[p + "mlp.c_proj.weight"].T
        if i == c.n_layer // 2:
            kept = x
    z = (rms(x - w["backout_lambda"] * kept) @ w["lm_head.weight"].T)[:, : c.vocab_size]
    return 15 * torch.tanh(z / 15)


def test_logits_follow_the_published_equations(lm):
    soft, mask = soft_batch()
    got = lm.target_nll(soft, mask, BEFORE, AFTER, TARGETS)
    for i in range(3):
        ids = [*AFTER[i], *TARGETS[i]]
        logits = literal_logits(lm.gpt, soft[i][mask[i]], ids)
        expected = F.cross_entropy(logits[-len(TARGETS[i]) - 1 : -1], torch.tensor(TARGETS[i]), reduction="sum")
        torch.testing.assert_close(got[i], expected, rtol=1e-4, atol=1e-4)


def test_the_short_window_has_the_size_of_the_equations():
    lm = shaken(GPTConfig(sequence_len=160, n_layer=2, n_head=2, n_kv_head=2, n_embd=32))
    assert lm.gpt.config.windows() == [128, 160]
    soft, mask = soft_batch(lengths=(180,))
    ids = [256, 104, 105]
    layout = pack_inputs(mask.sum(1), [[]], [ids])
    logits = lm.logits(lm.hidden(layout, soft[mask])[0])
    torch.testing.assert_close(logits[180:], literal_logits(lm.gpt, soft[0], ids)[180:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", [5, 6, 9, 14])
def test_windowed_attention_in_pieces_equals_one_masked_attention(width):
    q, k, v = torch.randn(3, 2, 4, width, 8).unbind(0)
    back = torch.arange(width)[:, None] - torch.arange(width)
    whole = F.scaled_dot_product_attention(q, k, v, attn_mask=(back >= 0) & (back <= 4))
    torch.testing.assert_close(windowed_attention(q, k, v, 4), whole)


def test_parameters_carry_nanochats_names_and_shapes():
    gpt = GPT(GPTConfig.from_depth(6, 64))
    shapes = {name: tuple(p.shape) for name, p in gpt.state_dict().items()}
    assert shapes["transformer.wte.weight"] == shapes["lm_head.weight"] == (320, 384)
    assert shapes["transformer.h.1.attn.ve_gate.weight"] == (6, 12)
    assert shapes["value_embeds.5.weight"] == (320, 384)
    assert shapes["transformer.h.0.mlp.c_fc.weight"] == (1536, 384)
    assert shapes["smear_gate.weight"] == (1, 24)
    assert shapes["resid_lambdas"] == shapes["x0_lambdas"] == (6,)
    assert {n for n in shapes if "ve_gate" in n} == {f"transformer.h.{i}.attn.ve_gate.weight" for i in (1, 3, 5)}
    assert not [name for name in shapes if "cos" in name or "bias" in name or "norm" in name]


def test_depth_gives_nanochats_widths_heads_and_windows():
    small, large = GPTConfig.from_depth(6, 64), GPTConfig.from_depth(5)
    assert (small.n_embd, small.n_head) == (384, 6)
    assert (large.n_embd, large.n_head) == (384, 3)
    assert small.windows() == [512, 512, 512, 2048, 512, 2048]
    assert small.windows(EARLY_MARCH) == [768, 768, 768, 2048, 768, 2048]
    assert small.windows(FIRST) == [1024, 1024, 1024, 2048, 1024, 2048]


def test_random_start_is_nanochats():
    gpt = GPT(GPTConfig())
    gpt.init_weights(0)
    bound = (3 / 384) ** 0.5
    block = gpt.blocks[1]
    assert gpt.transformer.wte.weight.std().item() == pytest.approx(0.8, rel=0.02)
    assert gpt.lm_head.weight.std().item() == pytest.approx(0.001, rel=0.02)
    assert block.attn.c_q.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert block.mlp.c_fc.weight.abs().max().item() == pytest.approx(0.4 * bound, rel=0.01)
    assert not block.attn.c_proj.weight.any()
    assert not block.mlp.c_proj.weight.any()
    assert gpt.resid_lambdas.tolist() == pytest.approx([1.15, 1.13, 1.11, 1.09, 1.07, 1.05])
    assert gpt.x0_lambdas.tolist() == pytest.approx([0.20, 0.17, 0.14, 0.11, 0.08, 0.05])
    assert (gpt.smear_lambda.item(), gpt.backout_lambda.item()) == pytest.approx((0, 0.2))


def test_the_same_seed_gives_the_same_model_and_identity():
    a, b, c = (load_lm("nanochat:d1", device="cpu", dtype=torch.float32, seed=seed) for seed in (1, 1, 2))
    assert a.identity == b.identity != c.identity
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_padding_and_other_rows_change_nothing(lm):
    soft, mask = soft_batch()
    together = lm.target_nll(soft, mask, BEFORE, AFTER, TARGETS)
    for i in range(3):
        alone = lm.target_nll(soft[i : i + 1], mask[i : i + 1], [BEFORE[i]], [AFTER[i]], [TARGETS[i]])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-5)


def test_soft_tokens_are_rms_normed_on_entry(lm):
    soft, mask = soft_batch()
    nats = lm.target_nll(soft, mask, BEFORE, AFTER, TARGETS)
    torch.testing.assert_close(lm.target_nll(7 * soft, mask, BEFORE, AFTER, TARGETS), nats, rtol=1e-4, atol=1e-4)


def test_text_before_the_audio_smears_into_the_text_after_it(lm):
    soft, mask = soft_batch(lengths=(3,))
    layout = pack_inputs(mask.sum(1), [[50, 51]], [[52]])
    _, chain = lm.gpt._smear(layout, torch.float32)
    _, straight = lm.gpt._smear(pack_inputs(torch.tensor([0]), [[50, 51, 52]], [[]]), torch.float32)
    torch.testing.assert_close(chain, straight)
    assert torch.isfinite(lm.target_nll(soft, mask, [[50, 51]], [[52]], [[256]])).all()


def test_gradients_of_a_frozen_model_reach_only_soft_tokens_and_of_a_trained_one_every_parameter(lm):
    soft, mask = soft_batch()
    soft.requires_grad_()
    lm.target_nll(soft, mask, BEFORE, AFTER, TARGETS).sum().backward()
    assert torch.equal(soft.grad.abs().sum(-1) > 0, mask)
    assert all(p.grad is None for p in lm.parameters())
    training = shaken(lm.gpt.config, train=True)
    training.target_nll(soft, mask, BEFORE, AFTER, TARGETS).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in training.parameters())


def test_generation_is_the_argmax_of_the_equations(lm):
    soft, mask = soft_batch()
    got = lm.generate(soft, mask, BEFORE, AFTER, 5)
    for i in range(3):
        ids: list[int] = []
        while len(ids) < 5:
            token = int(literal_logits(lm.gpt, soft[i][mask[i]], [*AFTER[i], *ids])[-1].argmax())
            if token == 256:
                break
            ids.append(token)
        assert got[i] == ids


def test_a_bfloat16_run_keeps_float32_masters():
    lm = load_lm("nanochat:d1", device="cpu", dtype=torch.bfloat16, train=True)
    soft, mask = soft_batch(width=64)
    nats = lm.target_nll(soft.bfloat16(), mask, BEFORE, AFTER, TARGETS)
    assert nats.dtype == torch.float32
    assert {p.dtype for p in lm.parameters()} == {torch.float32}


def test_the_loss_of_a_random_model_is_the_logarithm_of_its_vocabulary():
    lm = load_lm("nanochat:d1", device="cpu", dtype=torch.float32)
    nats = lm.target_nll(*soft_batch(width=64), BEFORE, AFTER, TARGETS)
    torch.testing.assert_close(nats / torch.tensor([3.0, 2.0, 1.0]), torch.full((3,), 5.549), rtol=0.01, atol=0.05)


def test_bytes_round_trip_and_decoding_accepts_invalid_utf8():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([*tokenizer.encode("né <|bos|>"), 256]) == "né <|bos|>"
    assert tokenizer.encode("<|bos|>a", special=True) == [256, 97]
    assert tokenizer.decode([195, 256, 104, 260]) == "\ufffdh"


def test_a_row_beyond_the_rotary_tables_is_rejected(lm):
    with pytest.raises(UserError, match="drop long utterances"):
        lm.target_nll(*soft_batch(lengths=(170,)), [[]], [[256]], [[256]])


@pytest.mark.parametrize("reference", ["nanochat:6", "nanochat:d0", "nanochat:d6-h7", "nanochat:/no/folder"])
def test_an_invalid_reference_is_rejected(reference):
    with pytest.raises(UserError, match="nanochat:d<depth>"):
        load_lm(reference, device="cpu", dtype=torch.float32)


def test_the_head_size_can_be_set():
    assert load_lm("nanochat:d2-h128", device="cpu", dtype=torch.float32).gpt.config.n_head == 1


@pytest.mark.parametrize("generation", [TODAY, EARLY_MARCH, FIRST], ids=lambda g: g.name)
@pytest.mark.parametrize("value", ["id0", "zero", "bos"])
@pytest.mark.parametrize(
    ("before", "after"),
    [(BEFORE, AFTER), ([[40, 41], [], [256]], [[], [50], []]), ([[], [7], []], [[], [], []]), ([[]] * 3, [[]] * 3)],
)
def test_cached_decoding_behind_audio_equals_uncached(generation, value, before, after):
    config = GPTConfig(sequence_len=16, n_layer=3, n_head=4, n_kv_head=2, n_embd=32, window_pattern="SL")
    lm = shaken(config, generation=generation)
    lm.gpt.audio_value_embedding, lm.gpt.bos = value, 256
    soft, mask = soft_batch(lengths=(9, 1, 24))
    lm.tokenizer.ends = frozenset({-1})  # every row decodes to the end: beyond the windows, from its own length
    expected = generate_whole_rows(lm, soft, mask, before, after, 12)
    assert lm.generate(soft, mask, before, after, 12) == expected
    assert len({tuple(row) for row in expected}) == 3
    for own, whole in zip(continued(lm), continued(lm, whole=True), strict=True):
        torch.testing.assert_close(own, whole, rtol=1e-4, atol=1e-4)


def test_each_cached_step_gives_the_hidden_state_of_the_whole_row():
    lm = shaken(GPTConfig(sequence_len=160, n_layer=3, n_head=4, n_kv_head=2, n_embd=32))
    soft, mask = soft_batch(lengths=(150, 3))
    layout, tokens = pack_inputs(mask.sum(1), [[9], []], [[256], [8, 9]]), torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    cache = lm.gpt.new_cache(2, 160, torch.float32)
    lm.gpt(layout, soft[mask], torch.float32, cache)
    for t in range(4):
        got = lm.gpt.decode_step(tokens[:, t], cache, torch.float32)
        rows = [[256, *tokens[0, : t + 1].tolist()], [8, 9, *tokens[1, : t + 1].tolist()]]
        whole = pack_inputs(mask.sum(1), [[9], []], rows)
        expected = lm.gpt(whole, soft[mask], torch.float32)[torch.arange(2), whole.last_positions]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_generation_ends_each_row_at_its_own_eos_and_may_be_empty(lm):
    soft, mask = soft_batch()
    free = lm.generate(soft, mask, BEFORE, AFTER, 8)
    lm.tokenizer.ends = frozenset({free[0][3]})
    try:
        stopped = lm.generate(soft, mask, BEFORE, AFTER, 8)
    finally:
        lm.tokenizer.ends = frozenset({256})
    for row, full in zip(stopped, free, strict=True):
        assert row == (full[: full.index(free[0][3])] if free[0][3] in full else full)
    assert lm.generate(soft, mask, BEFORE, AFTER, 0) == [[], [], []]


def test_value_embeddings_on_audio_positions_can_be_those_of_bos_or_none(lm):
    soft, mask = soft_batch()
    nats = {}
    try:
        for value in ("id0", "zero", "bos"):
            lm.gpt.audio_value_embedding, lm.gpt.bos = value, 256
            nats[value] = lm.target_nll(soft, mask, BEFORE, AFTER, TARGETS)
        lm.gpt.bos = 0
        torch.testing.assert_close(lm.target_nll(soft, mask, BEFORE, AFTER, TARGETS), nats["id0"])
        lm.gpt.audio_value_embedding = "id0"
        kept = {name: table.weight[0].clone() for name, table in lm.gpt.value_embeds.items()}
        with torch.no_grad():
            for table in lm.gpt.value_embeds.values():
                table.weight[0] = 0
        torch.testing.assert_close(lm.target_nll(soft, mask, BEFORE, AFTER, TARGETS), nats["zero"])
        with torch.no_grad():
            for name, table in lm.gpt.value_embeds.items():
                table.weight[0] = kept[name]
    finally:
        lm.gpt.audio_value_embedding = "id0"
    assert len({round(float(x.sum()), 4) for x in nats.values()}) == 3


def test_the_value_embedding_of_audio_is_an_option_of_nanochat_only(tmp_path):
    lm = load_lm("nanochat:d1", device="cpu", dtype=torch.float32, options=LmConfig(audio_value_embedding="bos"))
    assert (lm.gpt.audio_value_embedding, lm.gpt.bos) == ("bos", 256)
    with pytest.raises(UserError, match="only for nanochat models"):
        load_lm(f"path:{tmp_path}", device="cpu", dtype=torch.float32, options=LmConfig(audio_value_embedding="bos"))


def test_decoding_beyond_the_rotary_tables_is_rejected(lm):
    soft, mask = soft_batch(lengths=(150,))
    with pytest.raises(UserError, match="drop long utterances"):
        lm.generate(soft, mask, [[]], [[256]], 20)
