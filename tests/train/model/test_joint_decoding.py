"""Decoding by the language model and a CTC head together."""

from __future__ import annotations

import itertools

import pyarrow.parquet as pq
import pytest
import torch
from soft_tokens import AFTER, BEFORE, soft_batch
from tiny_cache import make_cache
from tiny_lm import save_tiny_lm
from tiny_run import make_config

from shards.errors import UserError
from train.config.model import DecodeConfig
from train.evaluation.run import evaluate_run
from train.lms.load import load_lm
from train.model.build import build_model
from train.model.ctc import read_tokens
from train.model.joint_decoding import CtcPrefixes, SpelledPrefixes, joint_decode, max_utterances, token_bytes
from train.projectors.ctc import BLANK, best_path, ctc_nll
from train.runs.folder import read_json
from train.trainer.fit import fit

TOKENS = [40, 50, 60]  # ids of classes 1 to 3
LENGTHS = 4, 1, 3


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    folder = save_tiny_lm(tmp_path_factory.mktemp("lm") / "tiny")
    return load_lm(f"path:{folder}", device="cpu", dtype=torch.float32)


def ctc(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    scores = 2 * torch.randn(3, max(LENGTHS), 1 + len(TOKENS), generator=torch.Generator().manual_seed(seed))
    return scores, torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]


def texts(limit: int) -> list[tuple[int, ...]]:
    return [text for size in range(limit + 1) for text in itertools.product((1, 2, 3), repeat=size)]


def probability_of_texts(scores: torch.Tensor, steps: int) -> dict[tuple[int, ...], float]:
    """Probability of each text of one utterance, from all of its paths."""
    found = dict.fromkeys(texts(steps), 0.0)
    probabilities = scores[:steps].softmax(-1).double()
    for path in itertools.product(range(4), repeat=steps):
        text = tuple(each for each, _ in itertools.groupby(path) if each != BLANK)
        found[text] += float(torch.stack([probabilities[i, c] for i, c in enumerate(path)]).prod())
    return found


def test_prefixes_have_the_probability_of_all_paths_that_begin_so():
    scores, mask = ctc()
    prefixes = CtcPrefixes(scores, mask)
    all_texts = [probability_of_texts(own, steps) for own, steps in zip(scores, LENGTHS, strict=True)]
    hypotheses = [[()] for _ in LENGTHS]
    moves = [
        ([[0, 0]] * 3, [[1, 2]] * 3),
        ([[1, 0], [0, 0], [1, 1]], [[2, 3], [1, 2], [2, 1]]),
        ([[0, 1]] * 3, [[2, 1]] * 3),
    ]
    for parents, classes in [*moves, (None, None)]:
        begun, whole = prefixes.begun().exp(), prefixes.whole().exp()
        for b, own in enumerate(hypotheses):
            for k, text in enumerate(own):
                assert float(whole[b, k]) == pytest.approx(all_texts[b].get(text, 0), rel=1e-4, abs=1e-9)
                for c in (1, 2, 3):
                    longer = (*text, c)
                    expected = sum(p for each, p in all_texts[b].items() if each[: len(longer)] == longer)
                    assert float(begun[b, k, c - 1]) == pytest.approx(expected, rel=1e-4, abs=1e-9)
        if parents is not None:
            prefixes.extend(torch.tensor(parents), torch.tensor(classes))
            hypotheses = [
                [(*hypotheses[b][p], c) for p, c in zip(parents[b], classes[b], strict=True)]
                for b in range(len(LENGTHS))
            ]


SPELLINGS = [b"\x00", b"\x01\x02", b"\x02\x02"]  # of the classes 1 to 3


def test_spelled_prefixes_have_the_probability_of_all_paths_whose_bytes_begin_so():
    scores, mask = ctc(2)
    prefixes = SpelledPrefixes(scores, mask, SPELLINGS)
    all_bytes = [probability_of_texts(own, steps) for own, steps in zip(scores, LENGTHS, strict=True)]
    hypotheses = [[()] for _ in LENGTHS]
    for parents, tokens in [
        ([[0] * 3] * 3, [[0, 1, 2]] * 3),
        ([[2, 0, 1, 1]] * 3, [[0, 0, 1, 2], [0, 1, 2, 0], [1, 1, 0, 0]]),
    ]:
        prefixes.spell(torch.tensor(parents), torch.tensor(tokens))
        hypotheses = [
            [(*own[p], *(1 + byte for byte in SPELLINGS[t])) for p, t in zip(ps, ts, strict=True)]
            for own, ps, ts in zip(hypotheses, parents, tokens, strict=True)
        ]
        for b, own in enumerate(hypotheses):
            for k, text in enumerate(own):
                begun = sum(p for each, p in all_bytes[b].items() if each[: len(text)] == text)
                assert float(prefixes.begun_so[b, k].exp()) == pytest.approx(begun, rel=1e-4, abs=1e-9)
                assert float(prefixes.whole()[b, k].exp()) == pytest.approx(
                    all_bytes[b].get(text, 0), rel=1e-4, abs=1e-9
                )
    prefixes.keep(torch.tensor([[3, 1]] * 3))
    texts_kept = [[own[3], own[1]] for own in hypotheses]
    for b, own in enumerate(texts_kept):
        for k, text in enumerate(own):
            assert float(prefixes.whole()[b, k].exp()) == pytest.approx(all_bytes[b].get(text, 0), rel=1e-4, abs=1e-9)


def test_a_text_does_not_begin_with_the_space_of_its_first_token():
    scores = torch.full((1, 4, 257), -20.0)
    for step, byte in enumerate(b"a bc"):
        scores[0, step, 1 + byte] = 20.0
    prefixes = SpelledPrefixes(scores, torch.ones(1, 4, dtype=torch.bool), [b" a", b" bc", b""])
    for token in (0, 1, 2):  # the last has no bytes
        prefixes.spell(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[token]]))
    assert float(prefixes.whole()) == pytest.approx(0, abs=1e-6)


def test_the_bytes_of_a_token_are_what_it_adds_to_a_text(lm):
    tokens = lm.tokenizer.encode("six pm")
    assert b"".join(token_bytes(lm.tokenizer.decode, tokens)) == b"six pm"
    strips = {7: "a", 8: "the"}  # a tokenizer whose words bring their space, and lose it at the beginning
    assert token_bytes(lambda ids: " ".join(strips[each] for each in ids), [7, 8]) == [b" a", b" the"]


@pytest.mark.parametrize(("weight", "spelling"), [(0.3, 0.0), (0.7, 0.0), (1.0, 0.0), (0.3, 0.4), (0.5, 0.5)])
def test_a_beam_that_holds_everything_finds_the_best_of_all_texts(lm, weight, spelling):
    soft, soft_mask = soft_batch()
    scores, mask = ctc(1)
    of_bytes = ctc(3)[0]
    config = DecodeConfig(ctc_weight=weight, spelling_weight=spelling, beam_size=500)
    with torch.no_grad():
        state = lm.decoding(soft, soft_mask, BEFORE, AFTER, 6)
        spelled = SpelledPrefixes(of_bytes, mask, SPELLINGS) if spelling else None
        found = joint_decode(state, CtcPrefixes(scores, mask), TOKENS, frozenset({2}), config, 6, spelled)
        every = texts(max(LENGTHS))
        for b in range(3):
            ids = [[TOKENS[c - 1] for c in text] for text in every]
            row = soft[b][soft_mask[b]]
            written = lm.candidate_nll(row, BEFORE[b], AFTER[b], [[*text, 2] for text in ids])
            heard = torch.stack([ctc_nll(scores[b : b + 1], mask[b : b + 1], [text])[0] for text in every])
            possible = heard > 0  # 0: the text does not fit its time steps
            letters = [[1 + byte for c in text for byte in SPELLINGS[c - 1]] for text in every]
            spelt = torch.stack([ctc_nll(of_bytes[b : b + 1], mask[b : b + 1], [own])[0] for own in letters])
            spelt = torch.where(spelt > 0, spelt, 1e30)
            score = weight * heard + (1 - weight - spelling) * written + (spelling * spelt if spelling else 0)
            score = torch.where(possible, score, torch.inf)
            assert found[b] == ids[int(score.argmin())]


def test_a_text_of_the_longest_length_may_lack_its_end(lm):
    scores = torch.full((1, 8, 4), -20.0)
    for step, heard in enumerate([1, 0, 2, 0, 3, 0, 1, 0]):
        scores[0, step, heard] = 20.0
    soft, soft_mask = soft_batch(lengths=(3,))
    mask = torch.ones(1, 8, dtype=torch.bool)

    def decode(limit):
        state = lm.decoding(soft, soft_mask, [[5]], [[]], limit)
        return joint_decode(
            state, CtcPrefixes(scores, mask), TOKENS, frozenset({2}), DecodeConfig(ctc_weight=0.9), limit
        )

    assert best_path(scores, mask) == [[1, 2, 3, 1]]
    assert decode(9) == [[40, 50, 60, 40]]
    assert decode(2) == [[40, 50]]


def test_a_cpu_decodes_as_many_hypotheses_as_its_cache_can_copy():
    assert max_utterances(DecodeConfig(beam_size=6), torch.device("cpu")) == 6
    assert max_utterances(DecodeConfig(beam_size=1000), torch.device("cpu")) == 1


def test_an_evaluation_of_a_run_may_decode_with_the_head_of_stage_one(tmp_path, monkeypatch):
    cache = make_cache(tmp_path / "cache", 24, val_every=6, min_frames=90, max_frames=140)
    reference = f"path:{save_tiny_lm(tmp_path / 'lm')}"
    posterior = {"kind": "posterior", "hidden": 12}
    config = make_config(
        tmp_path,
        cache,
        reference,
        projector=posterior,
        steps=1,
        pretrain={"steps": 4},
        max_new_tokens=40,
        decode={"ctc_weight": 0.5},
    )
    run = fit(config)

    def decoded(**keys) -> list[str]:
        evaluate_run(run, config.model_copy(update={"decode": DecodeConfig(beam_size=3, **keys)}))
        return pq.read_table(run / "utterances.parquet")["hypothesis"].drop_null().to_pylist()

    model = build_model(config, 8, torch.device("cpu"), torch.float32, run=run)
    ids = set(read_tokens(run))
    greedy, heard = decoded(), decoded(ctc_weight=1)
    found = read_json(run / "figures.json")["decoding"]
    assert found.startswith("by the CTC head and the LM together (weights 1 and 0, 3 hypotheses)")
    assert "(weights 0.5 and 0.5, 6 hypotheses); the LM reads the prompt" in (run / "report.html").read_text()
    assert greedy != heard
    assert all(set(model.lm.tokenizer.encode(text)) <= ids for text in heard)
    # the weight of the language model is 0: what it reads does not matter
    assert decoded(ctc_weight=1, context="one\ntwo\n") == heard
    starts, begin = [], type(model.lm).decoding

    def recorded(self, soft, mask, prefix, suffix, limit):
        starts.append((mask.sum().item(), {self.tokenizer.decode(ids) for ids in prefix}, {*map(len, suffix)}))
        return begin(self, soft, mask, prefix, suffix, limit)

    monkeypatch.setattr(type(model.lm), "decoding", recorded)
    decoded(ctc_weight=0.5, context="one\ntwo\n")
    assert starts
    assert all(each == (0, {"one\ntwo\n"}, {0}) for each in starts)
    starts.clear()
    decoded(ctc_weight=0.5)
    assert all(soft > 0 for soft, _, _ in starts)


def test_a_context_without_a_line_break_at_its_end_is_refused(tmp_path):
    with pytest.raises(UserError, match="does not end with a line break"):
        make_config(tmp_path, tmp_path, "nanochat:d2", ctc={"weight": 1}, decode={"ctc_weight": 0.5, "context": "one"})


def test_without_a_head_it_is_refused_with_what_mends_it(tmp_path):
    with pytest.raises(UserError, match=r"decode\.ctc_weight needs a CTC head: set ctc\.weight, or projector\.kind"):
        make_config(tmp_path, tmp_path, "nanochat:d2", decode={"ctc_weight": 0.5})


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"decode": {"ctc_weight": 0.8, "spelling_weight": 0.3}}, "lower them to a sum of at most 1"),
        ({"decode": {"ctc_weight": 0.5, "spelling_weight": 0.2}, "ctc": {"weight": 1}}, "needs a head over bytes: set"),
        ({"projector": {"kind": "posterior", "spelling": 0, "read_spelling": True}}, "set spelling above 0"),
    ],
)
def test_letters_that_no_head_spells_are_refused_with_what_mends_it(tmp_path, keys, sentence):
    with pytest.raises(UserError, match=sentence):
        make_config(tmp_path, tmp_path, "nanochat:d2", **keys)
