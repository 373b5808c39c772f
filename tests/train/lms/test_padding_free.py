"""Losses of joined rows are those of padded rows, and models that cannot keep rows apart are refused."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_cache import make_cache
from tiny_lm import save_tiny_lm
from tiny_run import forget_after, losses, make_config

from shards.config.base import load_config
from shards.errors import UserError
from train.config.model import LmConfig, LoraConfig
from train.distributed.signals import StopRequest
from train.lms.distill import distillation_losses
from train.lms.load import load_lm
from train.sweeps.group import LmCache, LockstepTrainer
from train.trainer.fit import fit

SIZES = {"vocab_size": 272, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2}
BEFORE, AFTER, TARGETS = [[5, 6], [7], [], [9]], [[8], [], [6], []], [[20, 21, 2], [22], [5, 2], [2, 2, 2, 2]]
LENGTHS = [3, 7, 1, 0]
FAMILIES = ["Llama", "Qwen2", "Qwen3", "GPT2"]


def save(folder, family, **keys):
    own = {"n_head": 4} if family == "GPT2" else HEADS
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**{**SIZES, **own, **keys})
        model = getattr(transformers, f"{family}{'LMHeadModel' if family == 'GPT2' else 'ForCausalLM'}")(config)
    return f"path:{save_tiny_lm(folder, model=model)}"


def load(reference, dtype=torch.float32, **options):
    return load_lm(reference, device="cpu", dtype=dtype, options=LmConfig(**options))


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lms")
    return {family: save(folder / family, family) for family in FAMILIES}


def run(lm, compute=None):
    """Nats and the gradients of the soft tokens and of the trained weights."""
    soft = torch.randn(4, 7, lm.width, generator=torch.Generator().manual_seed(0)).to(lm.dtype).requires_grad_()
    mask = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    nats = (compute or lm.target_nll)(soft, mask, BEFORE, AFTER, TARGETS)
    nats.sum().backward()
    return [nats.detach(), soft.grad, *(p.grad for p in lm.parameters() if p.requires_grad)]


@pytest.mark.parametrize("family", FAMILIES)
def test_joined_rows_have_the_nats_and_gradients_of_padded_rows(families, family):
    lm = load(families[family], padding_free=True)
    shapes = []
    lm.model.base_model.register_forward_pre_hook(
        lambda _, args, keys: shapes.append(keys["inputs_embeds"].shape), with_kwargs=True
    )
    found = run(lm)
    assert shapes == [(1, (2 + 3 + 1 + 2) + (1 + 7) + (1 + 1 + 1) + (1 + 3), 32)]
    torch.testing.assert_close(found, run(load(families[family])))


@pytest.mark.parametrize("options", [{"lora": LoraConfig(rank=2)}, {"gradient_checkpointing": True}])
def test_joined_rows_pass_the_same_gradients_through_adapters_and_recomputed_layers(families, options):
    if "lora" in options:
        pytest.importorskip("peft")

    def found(**more):
        lm = load(families["Llama"], **options, **more)
        with torch.no_grad():
            for parameter in (p for p in lm.parameters() if p.requires_grad):
                parameter.add_(0.1)
        return run(lm)

    torch.testing.assert_close(found(padding_free=True), found())


def test_joined_rows_of_a_bfloat16_model_differ_by_rounding(families):
    nats, grad = run(load(families["Qwen3"], torch.bfloat16, padding_free=True))
    expected, expected_grad = run(load(families["Qwen3"], torch.bfloat16))
    torch.testing.assert_close(nats, expected, rtol=0.02, atol=0.02)
    assert torch.cosine_similarity(grad.float().flatten(), expected_grad.float().flatten(), 0) > 0.999


def test_a_joined_row_does_not_depend_on_the_row_before_it(families):
    lm = load(families["Llama"], padding_free=True)
    none = torch.zeros(2, 0, dtype=torch.bool)
    soft = torch.empty(2, 0, lm.width)
    one = lm.target_nll(soft, none, [[5, 6], [7, 8]], [[], []], [[9, 2], [3, 2]])
    two = lm.target_nll(soft, none, [[9, 9], [7, 8]], [[], []], [[3, 2], [3, 2]])
    assert torch.equal(one[1], two[1])
    assert not torch.equal(one[0], two[0])


def test_joined_rows_are_distilled_as_padded_rows(families):
    def distilled(lm):
        return run(lm, lambda *rows: sum(distillation_losses(lm, *rows, temperature=2.0)))

    found = distilled(load(families["Llama"], padding_free=True))
    torch.testing.assert_close(found, distilled(load(families["Llama"])))


def test_a_model_for_joined_rows_decodes_and_scores_candidates_as_before(families):
    soft, mask = torch.randn(2, 3, 32), torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    found = []
    for padding_free in (False, True):
        lm = load(families["Llama"], padding_free=padding_free)
        found.append((lm.generate(soft, mask, [[5], []], [[6], [7]], 5), lm.candidate_nll(soft[0], [5], [6], TARGETS)))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize(
    ("family", "keys", "reason"),
    [
        ("Mistral", {"sliding_window": 4096}, "needs sliding_window"),
        ("Cohere2", {}, "it has layers of sliding_attention"),
        ("Gemma2", {}, "its attention is 'eager'"),
        ("Bloom", {"n_head": 4}, "do not keep rows apart|its attention is"),
        ("Mamba", {}, "do not keep rows apart|its attention is"),
    ],
)
def test_a_model_that_cannot_keep_joined_rows_apart_is_refused_in_one_sentence(tmp_path, family, keys, reason):
    reference = save(tmp_path, family, **keys)
    with pytest.raises(UserError, match=f"({reason}).*set lm.padding_free=false") as error:
        load(reference, padding_free=True)
    assert "\n" not in str(error.value)


def test_nanochat_and_compiled_models_refuse_joined_rows():
    with pytest.raises(UserError, match="only for Hugging Face models"):
        load("nanochat:d1", padding_free=True)
    with pytest.raises(UserError, match="set compile=false"):
        load_config(LmConfig, None, ["padding_free=true", "compile=true"])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("cache"), n=24, channels=8, val_every=4, min_frames=10, max_frames=60)


def settings(reference, **keys):
    terms = {"contrastive": {"weight": 0.1}, "ctc": {"weight": 0.1}, "projector": {"kind": "mlp", "norm": "rms"}}
    return {"lm": {"model": reference, "padding_free": True}, **terms, "steps": 4, **keys}


def test_a_run_without_padding_has_the_losses_of_one_with_it_and_resumes_exactly(families, cache, tmp_path):
    keys = settings(families["Llama"], checkpoint_every=2, eval_every=0)
    config = make_config(tmp_path, cache, "", **keys)
    run = fit(config)
    found = losses(run)
    padded = fit(make_config(tmp_path / "padded", cache, "", **{**keys, "lm": {"model": families["Llama"]}}))
    assert found == pytest.approx(losses(padded), rel=1e-5)
    forget_after(run, 2)
    fit(config, resume=run)
    assert losses(run) == found


@pytest.mark.slow
def test_experiments_in_lockstep_without_padding_train_as_alone(families, cache, tmp_path):
    keys = [settings(families["Llama"], eval_every=0, name=f"run-{i}", lr=10.0 ** (-2 - i)) for i in range(2)]
    configs = [make_config(tmp_path, cache, "", **own) for own in keys]
    LockstepTrainer(configs, LmCache(), "batched", StopRequest(), log=lambda line: None).run()
    for own in keys:
        alone = fit(make_config(tmp_path / "alone", cache, "", **own))
        assert losses(tmp_path / "runs" / own["name"]) == pytest.approx(losses(alone), rel=1e-4)
