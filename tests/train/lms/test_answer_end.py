"""The end of an answer: a set of ids, the same in targets, decoding and streaming, and as in transformers' generate."""

from __future__ import annotations

import pytest
import torch
from soft_tokens import AFTER, BEFORE, generate_whole_rows, soft_batch
from tiny_lm import save_tiny_lm

from train.config.model import MlpConfig, PromptConfig
from train.lms.base import LmRequest, SeparatePasses
from train.lms.hf.model import load_hf
from train.lms.packing import pack_inputs
from train.model.audio_lm import AudioLM
from train.model.prompt import Prompt
from train.projectors import build_projector
from train.sweeps.lm_batching import LmBatcher

SIZES = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "pad_token_id": 0,
}


def write(folder, family: str = "Llama", ends: list[int] | int | None = 2, **tokenizer):
    import transformers as hf

    more = {"Gemma3": {"head_dim": 16, "sliding_window": 8}, "Phi3": {"eos_token_id": 2}}.get(family, {})
    config = getattr(hf, f"{family}TextConfig" if family == "Gemma3" else f"{family}Config")(**SIZES, **more)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = getattr(hf, f"{family}ForCausalLM")(config)
    model.generation_config = hf.GenerationConfig(bos_token_id=1, pad_token_id=0, eos_token_id=ends)
    return save_tiny_lm(folder, model=model, **tokenizer)


def load(folder):
    return load_hf(folder, reference="tiny", identity="tiny", device="cpu", dtype=torch.float32)


def theirs(lm, soft, mask, ends, count: int) -> list[list[int]]:
    """The tokens of transformers' ``generate`` on the same embeddings, without the end and what follows it."""
    packed = pack_inputs(mask.sum(1), BEFORE, AFTER, pad="left")
    found = lm.model.generate(
        inputs_embeds=lm._embed_inputs(packed, soft[mask]),
        attention_mask=packed.valid.long(),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=ends,
    ).tolist()
    cut = [next((i for i, token in enumerate(row) if token in lm.tokenizer.ends), len(row)) for row in found]
    return [row[:end] for row, end in zip(found, cut, strict=True)]


@pytest.mark.parametrize("family", ["Llama", "Gemma3", "Phi3"])
def test_decoding_stops_at_every_end_of_the_generation_config_as_transformers_does(family, tmp_path):
    soft, mask = soft_batch()
    free = load(write(tmp_path / "free", family)).generate(soft, mask, BEFORE, AFTER, 9)
    ends = [2, free[0][2], free[1][4]]  # each row may end at another id
    lm = load(write(tmp_path / "ends", family, ends))
    assert lm.tokenizer.ends == {2, *ends}
    got = lm.generate(soft, mask, BEFORE, AFTER, 9)
    assert got == theirs(lm, soft, mask, None, 9)  # theirs come from generation_config.json
    assert [len(ids) for ids in got][:2] != [9, 9]
    assert got == generate_whole_rows(lm, soft, mask, BEFORE, AFTER, 9)


def test_an_end_that_only_the_generation_config_names_is_enough(tmp_path):
    lm = load(write(tmp_path, ends=[7, 9], eos=None))
    assert (lm.tokenizer.eos, lm.tokenizer.ends) == (7, {7, 9})


GEMMA = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
PHI = "{% for m in messages %}{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{{ eos_token }}"
SPACED = "{% for m in messages %}{{ m['content'] }} {{ eos_token }}{% endfor %}"
RAISES = "{% for m in messages %}{% if m['role'] != 'user' %}{{ raise_exception('no') }}{% endif %}u{% endfor %}"


@pytest.mark.parametrize(
    ("template", "end"), [(GEMMA, 2), (PHI, 2), (SPACED, 0), (RAISES, 0), ("{{ messages[0]['content'] }}", 0)]
)
def test_under_chat_an_answer_ends_with_the_first_special_token_that_the_template_writes_after_it(
    template, end, tmp_path
):
    lm = load(write(tmp_path, ends=5, eos="<|pad|>"))
    lm.tokenizer._tokenizer.chat_template = template
    prompts = {}
    for name in ("plain", "chat"):
        config = PromptConfig(template=name)
        prompts[name] = Prompt(config, lm.tokenizer) if template != RAISES else None
    assert lm.tokenizer.chat_end() == end
    if template == RAISES or "messages[0]" in template:
        return
    assert prompts["plain"].target_ids("six") == [*lm.tokenizer.encode("six"), 0]
    assert prompts["chat"].target_ids("six") == [*lm.tokenizer.encode("six"), end]
    assert (prompts["plain"].ends, prompts["chat"].ends) == ({0, 5}, {0, 5, end})


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """An audio LM whose tokenizer ends a text with 0, its generation config with 70, its chat template with 2."""
    lm = load(write(tmp_path_factory.mktemp("lm"), ends=70, eos="<|pad|>"))
    projector = build_projector(MlpConfig(), 6, lm.width, lm.embedding_rms, seed=0)
    with torch.no_grad():
        for parameter in projector.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return AudioLM(projector, lm, Prompt(PromptConfig(template="chat"), lm.tokenizer))


@pytest.mark.parametrize("end", [0, 2, 70])
def test_streaming_and_decoding_end_at_each_end(model, end, monkeypatch):
    torch.manual_seed(0)
    features, mask = torch.randn(1, 4, 6), torch.ones(1, 4, dtype=torch.bool)
    chosen = iter([60, 61, end, 62, 63, 64])

    def choose(hidden):
        logits = torch.zeros(len(hidden), 259)
        logits[:, next(chosen)] = 1
        return logits

    monkeypatch.setattr(model.lm, "logits", choose)
    streamed: list[str] = []
    text = model.generate(features, mask, 6, lambda texts: streamed.append(texts[0]))
    assert text == [model.lm.tokenizer.decode([60, 61])] == [streamed[-1]]
    chosen = iter([60, 61, end, 62, 63, 64])
    assert model.generate(features, mask, 6) == text


def test_targets_of_training_candidates_and_the_text_only_pass_end_with_the_end_of_the_prompt(model, monkeypatch):
    from train.evaluation.held_out_loss import _without_audio
    from train.model.prompt import PromptRow

    features, mask = torch.randn(2, 4, 6), torch.ones(2, 4, dtype=torch.bool)
    seen: list[list[int]] = []
    real = model.lm.candidate_nll
    monkeypatch.setattr(model.lm, "candidate_nll", lambda *a: seen.extend(a[-1]) or real(*a))
    model.candidate_nll(features[:1], mask[:1], ["six", ""])
    requests = [model.request(features, mask, ["six", ""]), _without_audio(model, ["six", ""], [PromptRow()] * 2)]
    for targets in (seen, *(request.targets for request in requests)):
        assert [ids[-1] for ids in targets] == [2, 2]


def test_experiments_with_other_ends_are_decoded_with_their_own(tmp_path):
    lm = load(write(tmp_path))
    soft, mask = soft_batch()
    free = lm.generate(soft, mask, BEFORE, AFTER, 8)
    requests = [
        LmRequest(soft, mask, BEFORE, AFTER, [[]] * 3, frozenset(ends)) for ends in ({2}, {2, free[0][3]}, {free[1][5]})
    ]
    assert LmBatcher(lm).generate(requests, 8) == SeparatePasses(lm).generate(requests, 8)
