"""Gradient checkpointing, logits in pieces, torch.compile, adapters and quantization: memory and equality."""

from __future__ import annotations

import builtins

import pytest
import torch
from tiny_lm import save_tiny_lm

from shards.config.base import load_config
from shards.errors import UserError
from train.config.model import LmConfig, LoraConfig
from train.lms.base import choose_max_logits
from train.lms.load import load_lm

BEFORE, AFTER, TARGETS = [[5, 6], [7]], [[8], []], [[20, 21, 22, 2], [22, 2]]


def load(reference, dtype=torch.float32, seed=0, **options):
    return load_lm(reference, device="cpu", dtype=dtype, seed=seed, options=LmConfig(**options))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return f"path:{save_tiny_lm(tmp_path_factory.mktemp('lm') / 'tiny')}"


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Width 128: matrices are quantized in blocks of 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=259, hidden_size=128, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=2, initializer_range=0.1, eos_token_id=2,
            )
        )  # fmt: skip
    return f"path:{save_tiny_lm(tmp_path_factory.mktemp('lm') / 'wide', model=model)}"


def run(lm):
    """Nats, the gradient that reaches the soft tokens, and the bytes kept for the backward pass."""
    soft = torch.randn(2, 5, lm.width, generator=torch.Generator().manual_seed(0)).to(lm.dtype).requires_grad_()
    weights = {tensor.untyped_storage().data_ptr() for tensor in [*lm.parameters(), *lm.buffers()]}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]).bool()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        nats = lm.target_nll(soft, mask, BEFORE, AFTER, TARGETS)
    nats.sum().backward()
    return nats.detach(), soft.grad, sum(size for size, _ in kept.values())


def shaken(lm):
    """With nanochat's initial weights, its layers output zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return lm


@pytest.mark.parametrize("kind", ["hf", "nanochat"])
def test_checkpointed_layers_give_the_same_nats_and_gradients_and_keep_less(tiny, kind):
    reference = tiny if kind == "hf" else "nanochat:d3"
    nats, grad, kept = run(shaken(load(reference)))
    again = shaken(load(reference, gradient_checkpointing=True))
    nats_again, grad_again, kept_again = run(again)
    torch.testing.assert_close(nats_again, nats)
    torch.testing.assert_close(grad_again, grad)
    assert not again.training
    assert kept_again < 0.5 * kept
    soft, mask = torch.randn(2, 3, again.width), torch.ones(2, 3, dtype=torch.bool)
    plain = shaken(load(reference)).generate(soft, mask, BEFORE, AFTER, 4)
    assert again.generate(soft, mask, BEFORE, AFTER, 4) == plain


def test_a_training_model_may_be_checkpointed(tiny):
    grads = []
    for checkpointing in (False, True):
        lm = load_lm(
            tiny, device="cpu", dtype=torch.float32, train=True, options=LmConfig(gradient_checkpointing=checkpointing)
        ).train()
        run(lm)
        grads.append([p.grad for p in lm.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", ["hf", "nanochat"])
def test_logits_in_pieces_give_the_same_nats_and_gradients_with_less_memory(tiny, kind, monkeypatch):
    lm = load(tiny if kind == "hf" else "nanochat:d1")
    nats, grad, _ = run(lm)
    sizes, logits = [], lm.logits
    monkeypatch.setattr(lm, "logits", lambda hidden: sizes.append(len(hidden)) or logits(hidden))
    lm.max_logits = 2 * lm.vocab_size + 1
    nats_pieces, grad_pieces, _ = run(lm)
    torch.testing.assert_close(nats_pieces, nats)
    torch.testing.assert_close(grad_pieces, grad)
    assert max(sizes) == 2
    lm.max_logits = 1
    torch.testing.assert_close(run(lm)[0], nats)


@pytest.mark.parametrize(("free", "chosen"), [(0, 2**25), (2 * 2**30, 2**25), (5 * 2**30, 2**26), (78 * 2**30, 2**28)])
def test_a_sixteenth_of_the_free_memory_holds_logits_within_a_floor_and_a_cap(monkeypatch, free, chosen):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 80 * 2**30))
    assert choose_max_logits(torch.device("cuda")) == chosen
    assert choose_max_logits(torch.device("cpu")) == 2**25


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # dynamo looks at all tensors
def test_a_compiled_forward_gives_the_same_nats_and_gradients(tiny, monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, **keys: compile_(f, backend="aot_eager", **keys)
    )  # to machine code: minutes
    lm = load(tiny, compile=True)
    nats, grad, _ = run(load(tiny))
    nats_compiled, grad_compiled, _ = run(lm)
    torch.testing.assert_close(nats_compiled, nats)
    torch.testing.assert_close(grad_compiled, grad)
    soft, mask = torch.randn(2, 3, 32), torch.ones(2, 3, dtype=torch.bool)
    assert lm.generate(soft, mask, BEFORE, AFTER, 3) == load(tiny).generate(soft, mask, BEFORE, AFTER, 3)
    assert {name for name, _ in lm.named_parameters()} == {name for name, _ in load(tiny).named_parameters()}


def test_adapters_start_at_zero_and_only_they_get_gradients(tiny):
    pytest.importorskip("peft")
    torch.manual_seed(0)
    expected = torch.randn(2)
    torch.manual_seed(0)
    lm = load(tiny, lora=LoraConfig(rank=4))
    assert torch.equal(torch.randn(2), expected)
    nats, grad, _ = run(load(tiny))
    got, got_grad, _ = run(lm)
    torch.testing.assert_close(got, nats)
    torch.testing.assert_close(got_grad, grad)
    trained = {name: p for name, p in lm.named_parameters() if p.requires_grad}
    assert trained
    assert all("lora_" in name for name in trained)
    assert not any("lm_head" in name for name in trained)
    assert sum(p.numel() for p in trained.values()) == 2 * 4 * (3 * (32 + 64) + 2 * (32 + 32) + 2 * (32 + 16))
    assert all(p.grad.any() for name, p in trained.items() if "lora_B" in name)
    assert lm.trainable
    with torch.no_grad():
        for parameter in trained.values():
            parameter.add_(0.1)
    assert not torch.allclose(run(lm)[0], nats)


def test_adapters_of_a_bfloat16_model_are_float32_and_start_from_the_seed(tiny):
    pytest.importorskip("peft")
    one, two, other = (
        load(tiny, torch.bfloat16, seed, lora=LoraConfig(target_modules=["q_proj"])) for seed in (1, 1, 2)
    )
    first, second, third = ({n: p for n, p in lm.named_parameters() if p.requires_grad} for lm in (one, two, other))
    assert {p.dtype for p in first.values()} == {torch.float32}
    assert all("q_proj" in name for name in first)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], third[name]) for name in first)
    nats, grad, _ = run(one)
    torch.testing.assert_close(nats, run(load(tiny, torch.bfloat16))[0])
    assert grad.any()
    assert one.generate(torch.randn(2, 3, 32).bfloat16(), torch.ones(2, 3, dtype=torch.bool), BEFORE, AFTER, 2)


def test_adapters_work_with_checkpointed_layers(tiny):
    pytest.importorskip("peft")
    lm = load(tiny, lora=LoraConfig(), gradient_checkpointing=True)
    run(lm)
    assert all(p.grad is not None for p in lm.parameters() if p.requires_grad)


def test_target_modules_that_match_no_layer_are_reported_in_one_sentence(tiny):
    pytest.importorskip("peft")
    with pytest.raises(UserError, match="matches no linear layer"):
        load(tiny, lora=LoraConfig(target_modules=["c_attn"]))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_matrices_are_smaller_and_close_and_pass_gradients(wide, bits):
    pytest.importorskip("bitsandbytes")
    lm, full = load(wide, torch.bfloat16, bits=bits), load(wide, torch.bfloat16)

    def size(model):
        return sum(p.untyped_storage().nbytes() for n, p in model.named_parameters() if "layers" in n and p.ndim == 2)

    assert size(lm) < {4: 0.3, 8: 0.6}[bits] * size(full)
    lm.to("cpu")
    nats, grad, _ = run(lm)
    torch.testing.assert_close(nats, run(full)[0], rtol=0.1, atol=0.1)
    cosine = torch.cosine_similarity(grad.float().flatten(), run(full)[1].float().flatten(), 0)
    assert cosine > 0.9
    assert all(p.grad is None for p in lm.parameters())
    soft = torch.randn(2, 3, 128).bfloat16()
    assert len(lm.generate(soft, torch.ones(2, 3, dtype=torch.bool), BEFORE, AFTER, 3)) == 2


def test_adapters_train_with_matrices_of_four_bits(wide):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("peft")
    lm = load(wide, torch.bfloat16, bits=4, lora=LoraConfig(rank=2))
    run(lm)
    trained = {name: p for name, p in lm.named_parameters() if p.requires_grad}
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    assert all(p.grad.any() for name, p in trained.items() if "lora_B" in name)


@pytest.mark.parametrize(("option", "library"), [({"lora": LoraConfig()}, "peft"), ({"bits": 4}, "bitsandbytes")])
def test_the_error_for_a_missing_package_names_it(tiny, monkeypatch, option, library):
    real = builtins.__import__

    def absent(name, *args, **keys):
        if name == library:
            raise ImportError(name)
        return real(name, *args, **keys)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(
        UserError, match=f"needs the Python package {library}, which is not installed: run `python -m pip install"
    ):
        load(tiny, **option)


@pytest.mark.parametrize("option", [{"lora": LoraConfig()}, {"bits": 8}, {"compile": True}])
def test_nanochat_rejects_options_of_hugging_face_models(option):
    with pytest.raises(UserError, match="for Hugging Face models"):
        load("nanochat:d1", **option)


def test_a_trained_model_rejects_adapters_and_quantization():
    assert load_config(LmConfig, None, ["lora.rank=4"]).lora == LoraConfig(rank=4)
    for words in (["train=true", "lora.rank=4"], ["train=true", "bits=8"]):
        with pytest.raises(UserError, match="not both"):
            load_config(LmConfig, None, words)
