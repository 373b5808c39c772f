from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_lm import save_tiny_lm

from train.config.model import MlpConfig, PosteriorConfig, PromptConfig, ResidualConfig
from train.lms.hf.model import load_hf
from train.lms.load import load_lm
from train.model.audio_lm import AudioLM
from train.model.ctc import find_head_tokens
from train.model.prompt import Prompt
from train.projectors import build_projector

TEXTS = ["six", "", "a quarter past ten"]
LENGTHS = [7, 3, 11]
PROJECTORS = [MlpConfig(stack=2, norm="rms"), ResidualConfig(stack=4)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_lm(tmp_path_factory.mktemp("lm") / "tiny")


def audio_lm(folder, projector=PROJECTORS[0], template="slam", dtype=torch.float32, train=False, lm=None):
    lm = lm or load_hf(folder, reference="tiny", identity="tiny", device="cpu", dtype=dtype, train=train)
    built = build_projector(projector, 6, lm.width, 1.0)
    return AudioLM(built, lm, Prompt(PromptConfig(template=template), lm.tokenizer))


def audio(lengths=LENGTHS, seed=0):
    features = torch.randn(len(lengths), max(lengths), 6, generator=torch.Generator().manual_seed(seed))
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return features.masked_fill(~mask[..., None], 0), mask


@pytest.mark.parametrize("projector", PROJECTORS, ids=lambda c: c.kind)
@pytest.mark.parametrize("template", ["plain", "slam", "chat"])
def test_nats_match_an_unbatched_loop_over_the_lms_own_forward(folder, projector, template):
    model = audio_lm(folder, projector, template)
    features, mask = audio()
    out = model.nll(features, mask, TEXTS)
    embed = model.lm.model.get_input_embeddings()
    for i, text in enumerate(TEXTS):
        soft, _ = model.projector(features[i : i + 1, : LENGTHS[i]], mask[i : i + 1, : LENGTHS[i]])
        ids = model.prompt.target_ids(text)
        tail = embed(torch.tensor([*model.prompt.suffix, *ids]))
        x = torch.cat([embed(torch.tensor(model.prompt.prefix).long()), soft[0], tail])[None]
        logits = model.lm.model(inputs_embeds=x).logits[0, -len(ids) - 1 : -1]
        expected = F.cross_entropy(logits, torch.tensor(ids), reduction="sum")
        torch.testing.assert_close(out.nll[i], expected, rtol=1e-5, atol=1e-5)
        assert out.tokens[i] == len(ids)


@pytest.mark.parametrize("kind", ["hf", "nanochat"])
def test_gradient_reaches_every_projector_parameter_and_none_of_the_frozen_lm(folder, kind):
    lm = None if kind == "hf" else load_lm("nanochat:d1", device="cpu", dtype=torch.float32)
    model = audio_lm(folder, lm=lm, template="plain").train()
    if lm is not None:  # at its random start nanochat's output projections are zero: nothing flows through them
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    out = model.nll(*audio(), TEXTS)
    (out.nll.sum() / out.tokens.sum()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.projector.parameters())
    assert all(p.grad is None and not p.requires_grad for p in model.lm.parameters())
    assert model.projector.training
    assert not model.lm.training


def test_a_training_lm_gets_gradients_too(folder):
    model = audio_lm(folder, train=True).train()
    model.nll(*audio(), TEXTS).nll.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("kind", ["hf", "nanochat"])
def test_padding_frames_and_other_rows_change_nothing(folder, kind):
    lm = None if kind == "hf" else load_lm("nanochat:d1", device="cpu", dtype=torch.float32)
    model = audio_lm(folder, lm=lm, template="plain")
    features, mask = audio()
    nats = model.nll(features, mask, TEXTS).nll
    wide = F.pad(features, (0, 0, 0, 5), value=3.0)
    torch.testing.assert_close(model.nll(wide, F.pad(mask, (0, 5)), TEXTS).nll, nats, rtol=1e-5, atol=1e-5)
    order = [2, 0]
    fewer = model.nll(features[order], mask[order], [TEXTS[i] for i in order]).nll
    torch.testing.assert_close(fewer, nats[order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_generate_equals_uncached_argmax_step_by_step(folder, template):
    model = audio_lm(folder, template=template)
    features, mask = audio()
    got = model.generate(features, mask, max_new_tokens=10)
    embed, tokenizer = model.lm.model.get_input_embeddings(), model.lm.tokenizer
    for i in range(3):
        soft, _ = model.projector(features[i : i + 1, : LENGTHS[i]], mask[i : i + 1, : LENGTHS[i]])
        ids: list[int] = []
        while len(ids) < 10 and tokenizer.eos not in ids:
            tail = embed(torch.tensor([*model.prompt.suffix, *ids]).long())
            x = torch.cat([embed(torch.tensor(model.prompt.prefix).long()), soft[0], tail])[None]
            ids.append(int(model.lm.model(inputs_embeds=x).logits[0, -1].argmax()))
        assert got[i] == tokenizer.decode(ids)


def test_soft_rms_counts_valid_soft_tokens_only(folder):
    model = audio_lm(folder)
    features, mask = audio()
    soft, soft_mask = model.soft_tokens(features, mask)
    rms = model.nll(features, mask, TEXTS).soft_rms
    assert rms.item() == pytest.approx(soft[soft_mask].square().mean().sqrt().item())
    assert not rms.requires_grad


def test_float16_features_are_cast_to_the_lms_dtype(folder):
    model = audio_lm(folder, dtype=torch.bfloat16)
    features, mask = audio()
    soft, _ = model.soft_tokens(features.half(), mask)
    assert soft.dtype == torch.bfloat16
    out = model.nll(features.half(), mask, TEXTS)
    out.nll.sum().backward()
    assert out.nll.dtype == torch.float32
    assert all(p.grad.dtype == torch.float32 for p in model.projector.parameters())


def test_the_loss_falls_in_a_few_steps_of_training_the_projector(folder):
    torch.manual_seed(0)
    model = audio_lm(folder, MlpConfig(stack=2, norm="rms"), "plain")
    features, mask = audio([8, 8])
    optimiser = torch.optim.AdamW(model.projector.parameters(), lr=0.02)
    losses = []
    for _ in range(40):
        out = model.nll(features, mask, ["one", "two"])
        loss = out.nll.sum() / out.tokens.sum()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    swapped = model.nll(features.flip(0), mask, ["one", "two"]).nll.sum().item() / 8
    assert losses[-1] < losses[0] - 1.0
    assert swapped > losses[-1] + 0.5


class Says(torch.nn.Module):
    """Byte scores that spell a text, a letter a step, of as many steps as there are."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.classes = torch.tensor([1 + byte for byte in text.encode()])

    def forward(self, x):
        return 9 * F.one_hot(self.classes[: x.shape[1]], 257).float().expand(len(x), -1, -1)


def test_the_lm_reads_what_the_bytes_spell_and_a_line_break_in_front_of_the_soft_tokens(folder):
    lm = load_hf(folder, reference="tiny", identity="tiny", device="cpu", dtype=torch.float32)
    tokens = find_head_tokens(lm, list(range(3, 12)))
    prompt = Prompt(PromptConfig(template="plain"), lm.tokenizer)
    plain, spelled = (
        AudioLM(
            build_projector(PosteriorConfig(hidden=12, read_spelling=on), 6, lm.width, 1.0, head_tokens=tokens),
            lm,
            prompt,
        )
        for on in (False, True)
    )
    for model in (plain, spelled):
        model.eval().projector.spelling = Says("six pm")
    features, mask = audio()
    (soft, soft_mask), (after, after_mask) = plain.soft_tokens(features, mask), spelled.soft_tokens(features, mask)
    for i, text in enumerate(["six\n", "si\n", "six pm\n"]):  # a step is two frames
        expected = torch.cat([lm.embed(torch.tensor(lm.tokenizer.encode(text))), soft[i][soft_mask[i]]])
        assert torch.equal(after[i][after_mask[i]], expected)
        assert len(expected) <= spelled.most_soft_tokens(LENGTHS[i])
    spelled.projector.spelling = Says("\x00" * 9)  # the path of a silent utterance spells nothing
    spelled.projector.spelling.classes.zero_()
    assert torch.equal(spelled.soft_tokens(features, mask)[0], soft)
