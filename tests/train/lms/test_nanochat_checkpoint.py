"""nanochat's checkpoint folders, written here as nanochat writes them."""

from __future__ import annotations

import json
import pathlib
import pickle
from dataclasses import asdict
from pathlib import Path

import pytest
import tiktoken
import torch

from shards.errors import UserError
from train.config.model import MlpConfig, PromptConfig
from train.lms.load import load_lm
from train.lms.nanochat.config import EARLY_MARCH, FIRST, TODAY, Generation, GPTConfig
from train.lms.nanochat.gpt import GPT
from train.lms.nanochat.tokenizers import TiktokenTokenizer, read_encoding
from train.model.audio_lm import AudioLM
from train.model.prompt import Prompt
from train.projectors import build_projector

SPECIAL = ["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"]
SIZES = {"sequence_len": 32, "vocab_size": 262, "n_layer": 4, "n_head": 2, "n_kv_head": 1, "n_embd": 32}
LATE = {"smear_gate.weight", "smear_lambda", "backout_lambda"}
LAMBDAS = {"resid_lambdas", "x0_lambdas"}


def encoding() -> tiktoken.Encoding:
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256}
    special = {name: 257 + i for i, name in enumerate(SPECIAL)}
    return tiktoken.Encoding(
        "rustbpe", pat_str=r"\p{L}+|\s+|[^\s\p{L}]+", mergeable_ranks=ranks, special_tokens=special
    )


def save(folder: Path, generation: Generation = TODAY, without: set[str] = frozenset(), step: int = 500, **keys) -> GPT:
    """Write a checkpoint of random weights and its tokenizer; return the model that loading it should return."""
    sizes = {**SIZES, **keys}
    config = GPTConfig(**{"window_pattern": "L", **sizes})
    gpt = GPT(config, generation)
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in gpt.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor for name, tensor in gpt.state_dict().items() if name not in without}
    torch.save({f"_orig_mod.{name}": tensor for name, tensor in state.items()}, folder / f"model_{step:06d}.pt")
    meta = {"step": step, "model_config": sizes, "user_config": {}}
    (folder / f"meta_{step:06d}.json").write_text(json.dumps(meta))
    (folder / "tokenizer.pkl").write_bytes(pickle.dumps(encoding()))
    with torch.no_grad():
        for name in without:
            gpt.get_parameter(name).fill_(1.0 if name == "resid_lambdas" else 0.0)
    return gpt


def load(place, **keys):
    return load_lm(f"nanochat:{place}", device="cpu", dtype=torch.float32, **keys)


def nats(lm, width=32):
    soft = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0))
    return lm.target_nll(soft, torch.tensor([[1, 1, 1], [1, 0, 0]]).bool(), [[257], []], [[5], [6]], [[7, 257], [257]])


@pytest.mark.parametrize(
    ("generation", "without"),
    [(TODAY, set()), (EARLY_MARCH, LATE), (FIRST, LATE), (FIRST, LATE | LAMBDAS)],
    ids=["today", "2026-03-09", "2026-01-11", "2025-10-13"],
)
def test_each_generation_is_detected_by_its_keys_and_what_it_lacks_has_no_effect(tmp_path, generation, without):
    written = save(tmp_path, generation, without, window_pattern="SL")
    lm = load(tmp_path)
    assert lm.gpt.generation == generation
    assert lm.gpt.config.window_pattern == "SL"
    state = lm.gpt.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in written.state_dict().items())
    assert torch.isfinite(nats(lm)).all()
    assert {name for name, p in load(tmp_path, train=True).gpt.named_parameters() if not p.requires_grad} == without
    assert not any(p.requires_grad for p in lm.parameters())


def test_a_meta_file_without_a_window_pattern_means_full_context_and_a_vocabulary_may_be_unpadded(tmp_path):
    save(tmp_path, FIRST, LATE | LAMBDAS)
    state = torch.load(tmp_path / "model_000500.pt", weights_only=True)
    for name in ("_orig_mod.transformer.wte.weight", "_orig_mod.lm_head.weight"):
        state[name] = state[name][:262].clone()
    torch.save(state, tmp_path / "model_000500.pt")
    lm = load(tmp_path)
    assert lm.gpt.config.windows(FIRST) == [32] * 4
    assert lm.gpt.transformer.wte.weight.shape == (262, 32)
    assert torch.isfinite(nats(lm)).all()


def test_the_newest_step_is_read_unless_a_file_is_named(tmp_path):
    first, last = save(tmp_path, step=500), save(tmp_path, step=21400)
    assert torch.equal(load(tmp_path).gpt.lm_head.weight, last.lm_head.weight)
    one = load(tmp_path / "model_000500.pt")
    assert torch.equal(one.gpt.lm_head.weight, first.lm_head.weight)
    assert one.identity != load(tmp_path).identity
    assert one.identity == load(tmp_path / "model_000500.pt").identity


def test_a_frozen_bfloat16_checkpoint_holds_its_matrices_in_bfloat16_and_a_training_one_float32_masters(tmp_path):
    save(tmp_path)
    half = load_lm(f"nanochat:{tmp_path}", device="cpu", dtype=torch.bfloat16)
    assert {p.dtype for p in half.gpt.parameters() if p.ndim == 2} == {torch.bfloat16}
    assert {p.dtype for p in half.gpt.parameters() if p.ndim == 1} == {torch.float32}
    torch.testing.assert_close(nats(half), nats(load(tmp_path)), rtol=0.05, atol=0.2)
    trained = load_lm(f"nanochat:{tmp_path}", device="cpu", dtype=torch.bfloat16, train=True)
    assert {p.dtype for p in trained.gpt.parameters()} == {torch.float32}


def test_a_bfloat16_checkpoint_is_read(tmp_path):
    save(tmp_path)
    state = torch.load(tmp_path / "model_000500.pt", weights_only=True)
    name = "_orig_mod.transformer.wte.weight"
    state[name] = state[name].bfloat16()
    torch.save(state, tmp_path / "model_000500.pt")
    assert load(tmp_path).gpt.transformer.wte.weight.dtype == torch.float32


def test_the_tokenizer_is_found_where_nanochats_training_keeps_it(tmp_path):
    save(tmp_path / "base_checkpoints" / "d4")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "base_checkpoints" / "d4" / "tokenizer.pkl").rename(tmp_path / "tokenizer" / "tokenizer.pkl")
    lm = load(tmp_path / "base_checkpoints" / "d4")
    assert (lm.tokenizer.bos, lm.tokenizer.eos) == (257, 257)
    assert lm.tokenizer.encode("this") == [256, 105, 115]
    assert lm.tokenizer.decode([256, 257, 105, 300]) == "thi"
    assert 257 not in lm.tokenizer.encode("<|bos|>")
    assert lm.tokenizer.encode("<|bos|>a", special=True) == [257, 97]


def test_a_chat_checkpoint_stops_at_the_same_token_as_nanochats_chat(tmp_path):
    save(tmp_path / "chatsft_checkpoints" / "d4")
    tokenizer = load(tmp_path / "chatsft_checkpoints" / "d4").tokenizer
    assert tokenizer.eos == 261
    assert tokenizer.encode(tokenizer.chat("hi"), special=True) == [257, 258, 104, 105, 259, 260]


def test_a_checkpoint_of_bytes_needs_no_tokenizer_and_any_other_does(tmp_path):
    save(tmp_path, vocab_size=257)
    (tmp_path / "tokenizer.pkl").unlink()
    assert load(tmp_path).tokenizer.eos == 256
    save(tmp_path)
    (tmp_path / "tokenizer.pkl").unlink()
    with pytest.raises(UserError, match=r"no tokenizer\.pkl"):
        load(tmp_path)


def test_a_tokenizer_of_another_vocabulary_is_rejected(tmp_path):
    save(tmp_path, vocab_size=263)
    with pytest.raises(UserError, match="has 262 tokens, its model 263"):
        load(tmp_path)


def test_a_gate_of_32_is_rejected_as_its_softcap_is_unknown(tmp_path):
    from dataclasses import replace

    save(tmp_path, replace(TODAY, gate_channels=32), LATE)
    with pytest.raises(UserError, match="between 2026-01-16 and 2026-03-09"):
        load(tmp_path)


@pytest.mark.parametrize("change", ["more", "less", "shape", "some_late"])
def test_keys_and_shapes_that_no_generation_has_are_rejected(tmp_path, change):
    save(tmp_path)
    state = torch.load(tmp_path / "model_000500.pt", weights_only=True)
    if change == "more":
        state["_orig_mod.engram.weight"] = torch.zeros(2)
    elif change == "less":
        del state["_orig_mod.transformer.h.2.mlp.c_fc.weight"]
    elif change == "shape":
        state["_orig_mod.transformer.h.0.attn.c_k.weight"] = torch.zeros(32, 32)
    else:
        del state["_orig_mod.backout_lambda"]
    torch.save(state, tmp_path / "model_000500.pt")
    with pytest.raises(UserError, match=r"is not of a supported version of nanochat: 1 tensors differ"):
        load(tmp_path)


class Evil:
    def __reduce__(self):
        return (print, ("code of the file ran",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch's own word on the file that is refused
def test_a_model_file_with_code_is_rejected_and_the_code_does_not_run(tmp_path, capsys):
    save(tmp_path)
    torch.save({"transformer.wte.weight": Evil()}, tmp_path / "model_000500.pt")
    with pytest.raises(UserError, match="not a file of tensors only"):
        load(tmp_path)
    (tmp_path / "model_000500.pt").write_bytes(b"\x80damaged")
    with pytest.raises(UserError, match="not a file of tensors only"):
        load(tmp_path)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "payload",
    [
        Evil(),
        {"name": "rustbpe"},
        pathlib.PurePosixPath,
        b"not a pickle",
        b"\x80\x04\x8c\x0dtiktoken.core\x8c\x08Encoding\x93)\x81\x8c\x04gpt2b.",  # tiktoken would fetch it
        [Evil()],
    ],
    ids=["code", "dict", "another class", "damaged", "registered name", "code within"],
)
def test_a_tokenizer_file_with_anything_else_is_rejected_and_runs_no_code(tmp_path, capsys, payload):
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(payload if isinstance(payload, bytes) else pickle.dumps(payload))
    with pytest.raises(UserError, match="Encoding"):
        read_encoding(path)
    assert "ran" not in capsys.readouterr().out


def test_an_encoding_round_trips(tmp_path):
    (tmp_path / "tokenizer.pkl").write_bytes(pickle.dumps(encoding()))
    again = read_encoding(tmp_path / "tokenizer.pkl")
    assert again.encode("the <|bos|>", allowed_special="all") == encoding().encode("the <|bos|>", allowed_special="all")
    with pytest.raises(UserError, match="lacks nanochat's special tokens"):
        TiktokenTokenizer(
            tiktoken.Encoding("x", pat_str=".", mergeable_ranks={bytes([i]): i for i in range(256)}, special_tokens={}),
            False,
            "nanochat:x",
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_embd": "32"}, "n_embd"),
        ({"mtp": 3}, "mtp"),
        ({"n_head": 5}, "invalid model_config"),
        ({"n_layer": 0}, "invalid model_config"),
        ({"n_layer": 10**9}, "invalid model_config"),
        ({"sequence_len": 10**12}, "invalid model_config"),
        ({"window_pattern": "XL"}, "invalid model_config"),
        (None, "does not exist"),
    ],
)
def test_a_meta_file_that_is_missing_or_unknown_is_rejected(tmp_path, change, message):
    save(tmp_path)
    meta = tmp_path / "meta_000500.json"
    if change is None:
        meta.unlink()
    else:
        sizes = {**asdict(GPTConfig()), **SIZES, **change}
        meta.write_text(json.dumps({"model_config": sizes}))
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_a_meta_file_that_is_not_json_is_rejected(tmp_path):
    save(tmp_path)
    (tmp_path / "meta_000500.json").write_text("[1")
    with pytest.raises(UserError, match="not a meta file of nanochat"):
        load(tmp_path)


def test_a_folder_without_a_checkpoint_is_rejected(tmp_path):
    with pytest.raises(UserError, match="has no nanochat checkpoint"):
        load(tmp_path)


@pytest.mark.parametrize("template", ["plain", "slam", "chat", "<|bos|>Hear: <|audio|> Write: "])
def test_a_chat_checkpoint_of_depth_6_trains_a_projector_and_answers(tmp_path, template):
    save(tmp_path / "chatsft_checkpoints" / "d6", n_layer=6, n_embd=128, window_pattern="SSSL")
    lm = load(tmp_path / "chatsft_checkpoints" / "d6")
    model = AudioLM(
        build_projector(MlpConfig(stack=2, norm="rms"), 6, 128, 1.0),
        lm,
        Prompt(PromptConfig(template=template), lm.tokenizer),
    )
    features, mask = torch.randn(2, 9, 6), torch.arange(9) < torch.tensor([9, 4])[:, None]
    out = model.nll(features, mask, ["this", ""])
    assert out.tokens.tolist() == [4, 1]
    out.nll.sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.projector.parameters())
    assert len(model.generate(features, mask, max_new_tokens=5)) == 2
    assert ("<|user_start|>" in model.prompt.text) == (template == "chat")
