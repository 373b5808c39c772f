"""What is shown before the first step: rows that fit, texts that survive, weights and a path that work."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from soft_tokens import AFTER, BEFORE, TARGETS, continued, generate_whole_rows, soft_batch
from tiny_cache import make_cache
from tiny_lm import save_tiny_lm
from tiny_run import make_config

from shards.errors import UserError
from train.config.model import PromptConfig
from train.data.caches import open_data
from train.lms.base import LanguageModel
from train.lms.hf.model import load_hf
from train.lms.load import load_lm
from train.model.build import build_model
from train.model.prompt import Prompt
from train.model.proof import lossy_texts, prove
from train.trainer.fit import fit

STATE = {
    "vocab_size": 259,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ATTENTION = {**STATE, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES = {
    "Mamba": {**STATE, "state_size": 4},
    "Rwkv": {**STATE, "attention_hidden_size": 32, "intermediate_size": 64},
    "RecurrentGemma": {**ATTENTION, "lru_width": 32, "attention_window_size": 8},
    "Llama4": {**ATTENTION, "intermediate_size_mlp": 64, "head_dim": 8, "num_local_experts": 2},
}
SHORT = {
    "Llama": {**ATTENTION, "max_position_embeddings": 30},
    "GPT2": {"vocab_size": 259, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 30, "eos_token_id": 2},
    "OPT": {**STATE, "ffn_dim": 64, "num_attention_heads": 4, "max_position_embeddings": 30, "word_embed_proj_dim": 32},
}


def write(folder, family: str, keys: dict):
    import transformers as hf

    config = getattr(hf, f"{family}TextConfig" if family == "Llama4" else f"{family}Config")(**keys)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        name = "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"
        return save_tiny_lm(folder, model=getattr(hf, name)(config))


def load(folder):
    return load_hf(folder, reference="tiny", identity="tiny", device="cpu", dtype=torch.float32)


@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.filterwarnings("ignore")
def test_state_space_models_and_llama_4_decode_and_score_candidates_as_whole_rows_do(family, tmp_path):
    lm = load(write(tmp_path, family, FAMILIES[family]))
    soft, mask = soft_batch()
    got = lm.generate(soft, mask, BEFORE, AFTER, 5)
    assert got == generate_whole_rows(lm, soft, mask, BEFORE, AFTER, 5)
    for own, expected in zip(continued(lm), continued(lm, whole=True), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-3, atol=1e-3)
    row = soft[0], BEFORE[0], AFTER[0], TARGETS
    torch.testing.assert_close(lm.candidate_nll(*row), LanguageModel.candidate_nll(lm, *row), rtol=1e-3, atol=1e-3)


def test_a_tokenizer_larger_than_the_embeddings_is_refused_with_both_sizes(tmp_path):
    with pytest.raises(UserError, match="259 tokens and its embeddings only 200"):
        load(write(tmp_path, "Llama", {**ATTENTION, "vocab_size": 200}))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value):
    folder = write(tmp_path, "Llama", ATTENTION)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"NaN or infinite values in the tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        load(folder)


@pytest.mark.parametrize(("dtype", "stored"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")])
def test_weights_that_are_codes_without_a_quantization_config_are_refused(tmp_path, dtype, stored):
    folder = write(tmp_path, "Llama", ATTENTION)
    tensors, name = load_file(folder / "model.safetensors"), "model.layers.1.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(dtype)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"the tensor {name} as {stored}, so the weights are quantized"):
        load_lm(f"path:{folder}", device="cpu", dtype=torch.float32)


RAISES = "{{ raise_exception('roles must alternate') }}"
NAMED = [{"name": "tool", "template": "{{ messages }}"}, {"name": "rag", "template": "{{ messages }}"}]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (RAISES, "TemplateError: roles must alternate"),
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ messages[0].missing.name }}", "UndefinedError"),
        ("a template without the turn", "it leaves out the text"),
        ({each["name"]: each["template"] for each in NAMED}, "ValueError"),
    ],
)
def test_a_chat_template_that_cannot_write_a_turn_is_refused_with_its_reason(tmp_path, template, reason):
    lm = load(write(tmp_path, "Llama", ATTENTION))
    lm.tokenizer._tokenizer.chat_template = template
    with pytest.raises(UserError, match=f"cannot write a user turn .*{reason}"):
        Prompt(PromptConfig(template="chat"), lm.tokenizer)


def test_a_chat_template_that_takes_only_parts_gets_parts_and_a_named_default_is_used(tmp_path):
    lm = load(write(tmp_path, "Llama", ATTENTION))
    parts = (
        "{% for m in messages %}<|im_start|>{{ m.role }}:{% for p in m.content %}"
        "{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    )
    for template in (parts, {"default": parts, "tool": RAISES}):
        lm.tokenizer._tokenizer.chat_template = template
        prompt = Prompt(PromptConfig(template="chat", instruction="Write."), lm.tokenizer)
        assert prompt.text == "<|im_start|>user:Write.\n<|audio|><|im_end|>"
        assert prompt.end == 2


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return make_cache(tmp_path_factory.mktemp("cache") / "cache", 16, val_every=4)


@pytest.mark.parametrize("family", list(SHORT))
def test_rows_beyond_the_positions_of_the_model_are_refused_before_a_run_exists(family, cache, tmp_path):
    model = f"path:{write(tmp_path / 'lm', family, SHORT[family])}"
    with pytest.raises(UserError, match=r"'utt-\d+' needs \d+ positions .* has 30: stack more") as refused:
        fit(make_config(tmp_path, cache, model, steps=1))
    assert ("exceed_context" in str(refused.value)) == (family == "Llama")
    assert not (tmp_path / "runs").exists()
    keys = {"lm": {"model": model, "exceed_context": True}, "steps": 1, "eval_every": 0}
    if family == "Llama":
        assert fit(make_config(tmp_path, cache, model, **keys)).is_dir()
    else:
        with pytest.raises(UserError, match="needs"):
            fit(make_config(tmp_path, cache, model, **keys))


def test_the_longest_row_is_counted_exactly(cache, tmp_path):
    folder = write(tmp_path / "lm", "Llama", {**ATTENTION, "max_position_embeddings": 10})
    with pytest.raises(UserError, match="needs") as refused:
        fit(make_config(tmp_path, cache, f"path:{folder}", steps=1))
    needed = int(str(refused.value).split("needs ")[1].split()[0])
    path = folder / "config.json"
    for limit, fits in ((needed - 1, False), (needed, True)):
        path.write_text(json.dumps({**json.loads(path.read_text()), "max_position_embeddings": limit}))
        config = make_config(tmp_path, cache, f"path:{folder}", steps=1, eval_every=0)
        if fits:
            fit(config)
        else:
            with pytest.raises(UserError, match="needs"):
                fit(config)


def test_a_model_that_cannot_decode_is_refused_before_a_run_exists(cache, tmp_path, monkeypatch):
    from train.lms.hf.model import HfLanguageModel

    model = f"path:{write(tmp_path / 'lm', 'Llama', ATTENTION)}"

    def broken(*_: object, **__: object) -> None:
        raise AttributeError("no attribute 'past_key_values'")

    monkeypatch.setattr(HfLanguageModel, "generate", broken)
    with pytest.raises(UserError, match=r"cannot decode soft tokens \(AttributeError: no attribute 'past_key_values'"):
        fit(make_config(tmp_path, cache, model, steps=1))
    assert not (tmp_path / "runs").exists()


def test_a_loss_that_is_nan_before_training_is_refused_before_a_run_exists(cache, tmp_path, monkeypatch):
    from train.lms.hf.model import HfLanguageModel

    model = f"path:{write(tmp_path / 'lm', 'Llama', ATTENTION)}"
    nll = HfLanguageModel.target_nll
    monkeypatch.setattr(HfLanguageModel, "target_nll", lambda *args, **kwargs: nll(*args, **kwargs) * float("nan"))
    with pytest.raises(UserError, match=r"the loss of '.*' is nan before training"):
        fit(make_config(tmp_path, cache, model, steps=1))
    assert not (tmp_path / "runs").exists()


def test_a_projector_with_another_number_of_soft_tokens_than_it_says_is_refused(cache, tmp_path, monkeypatch):
    from train.projectors.mlp import MlpProjector

    model = f"path:{write(tmp_path / 'lm', 'Llama', ATTENTION)}"
    monkeypatch.setattr(MlpProjector, "soft_frames", lambda self, frames: frames)
    with pytest.raises(UserError, match=r"MlpProjector makes \d+ soft tokens of (\d+) frames, .* says \1"):
        fit(make_config(tmp_path, cache, model, steps=1))
    assert not (tmp_path / "runs").exists()
    monkeypatch.setattr(MlpProjector, "content_decides", True)
    fit(make_config(tmp_path, cache, model, steps=1, eval_every=0))


def test_the_proof_leaves_every_module_in_its_mode(cache, tmp_path):
    config = make_config(tmp_path, cache, f"path:{write(tmp_path / 'lm', 'Llama', ATTENTION)}")
    model = build_model(config, 8, torch.device("cpu"), torch.float32)
    model.train()
    before = {name: module.training for name, module in model.named_modules()}
    assert set(before.values()) == {True, False}
    prove(model, open_data(config), config)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_a_language_model_of_pickles_is_refused(tmp_path):
    folder = write(tmp_path, "Llama", ATTENTION)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"cannot be loaded as a causal language model: .*safetensors"):
        load_lm(f"path:{folder}", device="cpu", dtype=torch.float32)


class Letters:
    """A tokenizer of ASCII letters and spaces in lower case."""

    def encode(self, text, special=False):
        return [ord(char) if char.isascii() else 0 for char in text.lower()]

    def decode(self, ids):
        return " ".join("".join(chr(i) for i in ids if i).split())


def test_texts_that_lose_more_than_space_case_and_form_are_found():
    assert lossy_texts(Letters(), ["Two  words", "हिन्दी", "naïve"]) == [
        ("हिन्दी", ""),
        ("naïve", "nave"),
    ]


def test_lossy_texts_are_counted_and_one_is_shown_and_too_many_are_refused(cache, tmp_path, monkeypatch, capsys):
    from train.lms.hf.model import HfTokenizer

    encode, lost = HfTokenizer.encode, first_text(cache)
    monkeypatch.setattr(
        HfTokenizer, "encode", lambda self, text, special=False: encode(self, "" if text == lost else text, special)
    )
    model = f"path:{write(tmp_path / 'lm', 'Llama', ATTENTION)}"
    with pytest.raises(UserError, match=r"1 of 12 texts do not survive .*, which becomes '': .* max_lossy_texts=0\.01"):
        fit(make_config(tmp_path, cache, model, steps=1))
    fit(make_config(tmp_path, cache, model, steps=1, max_lossy_texts=1, eval_every=0))
    assert "note: 1 of 12 texts do not survive the tokenizer" in capsys.readouterr().err


def first_text(cache) -> str:
    from shards.read.cache import Cache

    return next(row["text"] for row in Cache.open(cache).manifest.to_pylist() if row["split"] != "val")
