from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tiny_cache import make_cache
from tiny_lm import save_tiny_lm
from tiny_run import make_config

from train.data.caches import Utterances, open_data
from train.distributed.group import ProcessGroup
from train.evaluation.batches import UtteranceReader
from train.evaluation.embedding_space import measure_embedding_space, nearest_tokens
from train.evaluation.evaluate import EvalConfig, evaluate
from train.evaluation.held_out_loss import text_only_losses
from train.evaluation.retrieval import make_groups, retrieve
from train.evaluation.run import evaluate_run
from train.evaluation.silence import Silence, measure_hallucination
from train.evaluation.utterance_table import read_utterances
from train.model.audio_lm import ModelList
from train.model.build import build_model
from train.report import write_report
from train.trainer.fit import fit


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A cache of 80 utterances, 20 held out, and a tiny frozen LM."""
    folder = tmp_path_factory.mktemp("measures")
    cache = make_cache(folder / "cache", 80, val_every=4)
    return make_config(folder, cache, f"path:{save_tiny_lm(folder / 'lm')}", retrieval_limit=20)


@pytest.fixture(scope="module")
def held_out(config) -> Utterances:
    return open_data(config).held_out


@pytest.fixture(scope="module")
def model(config):
    return build_model(config, 8, torch.device("cpu"), torch.float32).eval()


@pytest.fixture
def reader(held_out) -> UtteranceReader:
    return UtteranceReader(held_out, 5, None, lambda: False, ProcessGroup())


@pytest.fixture(scope="module")
def run(config):
    return fit(config)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():  # as in an evaluation; the fixture `run` trains before this
        yield


def summary_of(run):
    return json.loads((run / "summary.json").read_text())


def test_the_silent_loss_is_that_of_every_text_with_as_many_silent_frames(config, held_out, model):
    result = evaluate(model, held_out, EvalConfig(decode_limit=0, complete=True, max_new_tokens=4))
    silence = np.zeros((1, 8), np.float32)
    assert result.extra_metrics["silence"].startswith("zeros: ")  # the tiny cache's encoder exists nowhere
    nats, tokens = 0.0, 0
    for text, frames in zip(*held_out.columns("text", "frames").values(), strict=True):
        features = torch.from_numpy(np.repeat(silence, frames, 0))[None]
        out = model.nll(features, torch.ones(1, frames, dtype=torch.bool), [text])
        nats, tokens = nats + float(out.nll.sum()), tokens + int(out.tokens.sum())
    assert result.extra_metrics["val_loss_silent"] == pytest.approx(nats / tokens, rel=1e-5)
    assert result.extra_metrics["silent_gain"] == pytest.approx(nats / tokens - result.val_loss, rel=1e-4)


def test_silence_longer_than_the_encoded_one_repeats_it(model):
    silence = Silence(np.arange(6, dtype=np.float32).reshape(3, 2), "test")
    assert silence.features_of_length(2).tolist() == [[0, 1], [2, 3]]
    assert silence.features_of_length(4).tolist() == [[0, 1], [2, 3], [4, 5], [0, 1]]


def test_the_text_only_loss_is_that_of_the_language_model_without_soft_tokens(model, reader):
    found = text_only_losses(ModelList([model]), reader)[0]
    hf = model.lm.model
    for index, text in enumerate(reader.texts):
        ids = model.prompt.target_ids(text)
        read = torch.tensor([[model.lm.tokenizer.bos, *ids]])
        logits = hf(input_ids=read).logits[0, :-1].float()
        wanted = torch.nn.functional.cross_entropy(logits, torch.tensor(ids), reduction="sum")
        assert found.nll[index] == pytest.approx(float(wanted), rel=1e-4)
    assert found.tokens.tolist() == [len(model.prompt.target_ids(text)) for text in reader.texts]


def test_the_share_of_silent_inputs_with_words_is_counted(model, reader, monkeypatch):
    said = ["go left", "", " … ", "no"]

    def answer(self, features, mask, most, rows):
        return [[said[len(mask) % 4]] * len(mask)]

    monkeypatch.setattr(ModelList, "generate", answer)
    (found,) = measure_hallucination(ModelList([model]), reader, Silence(np.zeros((1, 8), np.float32), "test"), 4)
    lengths = min(16, len(set(reader.frames)))
    batches = [5] * (lengths // 5) + [lengths % 5] * bool(lengths % 5)
    spoken = sum(size for size in batches if said[size % 4].isascii() and said[size % 4])
    assert found.inputs == lengths
    assert found.rate == pytest.approx(spoken / lengths)


def test_groups_hold_sixteen_different_texts_with_audio_of_similar_length():
    texts = [f"text {i % 40}" for i in range(60)]
    frames = [(7 * i) % 60 for i in range(60)]
    groups = make_groups(texts, frames, range(60))
    assert [len(group) for group in groups] == [16, 16]
    for group in groups:
        assert len({texts[i] for i in group}) == 16
    ordered = [frames[i] for group in groups for i in group]
    assert ordered == sorted(ordered)
    assert make_groups(["a", "a"], [1, 2], range(2)) == []
    assert [len(group) for group in make_groups(["a", "b", "a"], [1, 2, 3], range(3))] == [2]


class Oracle(torch.nn.Module):
    """A fake LM: the loss of a text is 0 with audio of the right number of frames, else 1."""

    def __init__(self, model, frames_of):
        super().__init__()
        self.prompt, self.lm, self.soft_tokens = model.prompt, model.lm, model.soft_tokens
        self.frame_counts = frames_of

    def candidate_nll(self, features, mask, texts, row):
        return torch.tensor([float(self.frame_counts[text] != int(mask.sum())) for text in texts])


def test_an_oracle_retrieves_all_pairs_and_a_model_that_ignores_audio_one_per_group(model, tmp_path):
    cache = make_cache(tmp_path / "cache", 60, min_frames=1, max_frames=900, seed=2)
    utterances = open_data(make_config(tmp_path, cache, "", val={"fraction": 0.9})).held_out
    reader = UtteranceReader(utterances, 5, None, lambda: False, ProcessGroup())
    frames = {}  # one utterance per text and length
    for index, text in enumerate(reader.texts):
        if reader.frames[index] not in frames.values():
            frames.setdefault(text, reader.frames[index])
    chosen = [i for i, text in enumerate(reader.texts) if frames.get(text) == reader.frames[i]]
    found = retrieve(Oracle(model, frames), reader, chosen)
    assert found.candidates == 16
    assert (found.by_likelihood.mean, found.audio_by_likelihood.mean) == (1, 1)
    ignoring = retrieve(Oracle(model, dict.fromkeys(frames, 0)), reader, chosen)
    assert ignoring.audio_by_likelihood.mean == pytest.approx(1 / 16)
    assert found.metrics()["chance"] == 1 / 16


def test_retrieval_with_few_frames_at_a_time_finds_the_same(model, held_out):
    narrow, wide = (UtteranceReader(held_out, 5, most, lambda: False, ProcessGroup()) for most in (100, None))
    for reader in (narrow, wide):
        reader.found = retrieve(model, reader, range(20))
    assert narrow.found == wide.found


@pytest.mark.parametrize("template", ["plain", "slam"])
def test_candidates_after_one_audio_have_the_loss_that_they_have_alone(config, held_out, template):
    options = config.model_copy(update={"prompt": config.prompt.model_copy(update={"template": template})})
    model = build_model(options, 8, torch.device("cpu"), torch.float32).eval()
    features = torch.from_numpy(held_out.features(0)[None].copy())
    mask = torch.ones(features.shape[:2], dtype=torch.bool)
    texts = ["one", "", "turn left at the red light", "x"]
    together = model.candidate_nll(features, mask, texts)
    alone = [float(model.nll(features, mask, [text]).nll[0]) for text in texts]
    assert together.tolist() == pytest.approx(alone, rel=1e-4)
    assert model.candidate_nll(features, mask, [""]).tolist() == pytest.approx(alone[1:2], rel=1e-4)


def test_the_nearest_tokens_of_embeddings_are_their_own_tokens(model):
    ids = torch.tensor([40, 7, 200])
    nearest = nearest_tokens(model, 3 * model.lm.embed(ids))
    assert [text for text, _ in nearest] == [model.lm.tokenizer.decode([i]) for i in ids.tolist()]
    assert [cosine for _, cosine in nearest] == pytest.approx([1, 1, 1], abs=1e-3)


def test_the_plane_is_that_of_the_first_two_principal_components(model, reader):
    tree = measure_embedding_space(model, reader)
    plane = tree["plane"]
    points = np.array(
        [[x, y] for x, y, _ in plane["vocabulary"]] + [p for u in plane["utterances"] for p in u["points"]]
    )
    assert np.abs(points.mean(0)).max() < 1e-3  # centered
    assert abs(np.corrcoef(points.T)[0, 1]) < 1e-3  # components do not correlate
    assert points[:, 0].var() >= points[:, 1].var()
    assert 0 < plane["explained"][1] <= plane["explained"][0] <= 1
    assert len(plane["utterances"]) == 8
    frames = [each["frames"] for each in plane["utterances"]]
    assert frames[0] == min(reader.frames)
    assert frames[-1] == max(reader.frames)
    assert len(tree["tokens"]) == 4
    assert measure_embedding_space(model, reader) == tree


def test_a_finished_run_has_every_metric_with_its_interval(run):
    summary = summary_of(run)
    for name in ("val_loss", "audio_gain", "silent_gain", "text_only_gain", "wer", "cer"):
        low, high = summary["intervals"][name]
        assert low <= summary[name] <= high, name
    assert summary["word_edits"].keys() == {"length", "insertions", "deletions", "substitutions"}
    errors = sum(summary["word_edits"].values()) - summary["word_edits"]["length"]
    assert summary["wer"] == errors / summary["word_edits"]["length"]
    assert 0 <= summary["hallucination_rate"] <= 1
    assert summary["retrieval"]["candidates"] == 16
    assert (run / "space.json").is_file()


def test_the_counts_of_the_utterances_add_up_to_the_metrics(run):
    summary, table = summary_of(run), read_utterances(run)
    assert len(table) == summary["n_val"] == 20
    columns = {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}
    tokens = columns["tokens"].sum()
    for column, figure in (
        ("nats", "val_loss"),
        ("nats_shuffled", "val_loss_shuffled"),
        ("nats_silent", "val_loss_silent"),
        ("nats_text_only", "val_loss_text_only"),
    ):
        assert columns[column].sum() / tokens == pytest.approx(summary[figure])
    assert sum(text is not None for text in table["hypothesis"].to_pylist()) == summary["n_decoded"] == 3
    assert np.nansum(columns["words"]) == summary["word_edits"]["length"]
    assert all(heard != key for heard, key in zip(columns["heard"], columns["key"], strict=True))


def test_all_of_another_corpus_is_evaluated_into_a_separate_folder(run, config, tmp_path):
    before = read_utterances(run)
    other = make_cache(tmp_path / "other", 18, seed=3)
    figures = evaluate_run(run, config, str(other))
    write_report(run)
    assert figures["retrieval"]["utterances"] >= 16
    (folder,) = (run / "judged").iterdir()
    assert len(read_utterances(folder)) == figures["n_val"] == 18
    assert json.loads((folder / "figures.json").read_text())["val_loss"] == figures["val_loss"]
    assert f"{figures['val_loss']:.3f}" in write_report(run).read_text()
    assert (folder / "space.json").is_file()
    assert read_utterances(run).equals(before)


def test_nanochat_is_evaluated_completely_with_its_soft_tokens_as_input_embeddings(config, held_out):
    options = config.model_copy(update={"lm": config.lm.model_copy(update={"model": "nanochat:d1"})})
    nanochat = build_model(options, 8, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        nanochat.lm.gpt.lm_head.weight.normal_(0, 1, generator=torch.Generator().manual_seed(0))
    whole = EvalConfig(decode_limit=0, max_new_tokens=4, complete=True, retrieval_limit=16)
    result = evaluate(nanochat, held_out, whole)
    assert result.extra_metrics["retrieval"]["candidates"] == 16
    assert result.extra_metrics["val_loss_text_only"] != result.val_loss
    soft = torch.randn(3, nanochat.lm.width)
    assert nanochat.lm.to_input_embeddings(soft).square().mean(-1).tolist() == pytest.approx([1, 1, 1], rel=1e-3)
    assert nearest_tokens(nanochat, nanochat.lm.to_input_embeddings(nanochat.lm.embed(torch.tensor([5]))))[0][
        1
    ] == pytest.approx(1)


def test_an_evaluation_during_training_omits_the_costly_metrics(model, held_out):
    result = evaluate(model, held_out, EvalConfig(decode_limit=0))
    assert result.embedding_space is None
    assert not {"val_loss_silent", "retrieval", "hallucination_rate"} & result.metrics().keys()
