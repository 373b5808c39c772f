"""The CTC head, and the projector that makes soft tokens of its scores."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from tiny_projectors import mask_of, shake

from train.config.model import PosteriorConfig
from train.projectors import LayerMixer, MixedProjector, build_projector
from train.projectors.ctc import BLANK, CtcHead, HeadTokens, best_path, ctc_nll, needed_steps, spellings
from train.projectors.posterior import PosteriorProjector, merge_runs

PIECES = ["A", " A", "AB", "B", "C"]
EMBEDDINGS = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _seed():
    """Random inputs do not depend on which tests ran before in the same process."""
    torch.manual_seed(0)


def build(**keys) -> PosteriorProjector:
    config = PosteriorConfig(hidden=16, **keys)
    projector = build_projector(config, 6, 8, 0.136, head_tokens=HeadTokens(EMBEDDINGS, spellings(PIECES)))
    assert isinstance(projector, PosteriorProjector)
    shake(projector)
    with torch.no_grad():  # as after stage 1
        projector.residual.weight.zero_()
        projector.residual.bias.zero_()
    return projector.eval()


def collapse(path: tuple[int, ...]) -> list[int]:
    return [each for each, _ in itertools.groupby(path) if each != BLANK]


def test_the_loss_is_that_of_all_paths_that_say_the_text():
    scores = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(1))
    logs = scores[0].log_softmax(-1)
    for target in ([1], [1, 2], [2, 2], [1, 2, 1]):
        paths = [path for path in itertools.product(range(3), repeat=4) if collapse(path) == target]
        expected = -torch.logsumexp(torch.stack([sum(logs[i, c] for i, c in enumerate(path)) for path in paths]), 0)
        found = ctc_nll(scores, torch.ones(1, 4, dtype=torch.bool), [target])
        assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_a_text_that_does_not_fit_has_no_loss_and_is_counted_by_its_needed_steps():
    assert [needed_steps(row) for row in ([], [1], [1, 2], [1, 1], [1, 1, 1])] == [0, 1, 2, 3, 5]
    scores = torch.randn(2, 3, 3, requires_grad=True)
    nll = ctc_nll(scores, mask_of([3, 2], 3), [[1, 1], [1, 1]])
    assert nll[0] > 0
    assert nll[1] == 0
    nll.sum().backward()
    assert torch.isfinite(scores.grad).all()


def test_the_best_path_merges_repeats_and_drops_blanks_and_padding():
    path = torch.tensor([[0, 1, 1, 0, 1, 2], [2, 2, 0, 0, 1, 1]])
    assert best_path(torch.nn.functional.one_hot(path).float(), mask_of([6, 4], 6)) == [[1, 1, 2], [2]]


def silent_spellings(head: CtcHead) -> CtcHead:
    with torch.no_grad():
        head.bytes.zero_()
    return head


def test_the_head_scores_the_direction_of_an_embedding_and_not_its_length():
    head = silent_spellings(CtcHead(HeadTokens(EMBEDDINGS, spellings(PIECES))))
    scores = head(3.0 * EMBEDDINGS)
    assert scores.shape == (5, 6)
    assert scores[:, 1:].argmax(-1).tolist() == [0, 1, 2, 3, 4]
    assert scores[:, 1:].diagonal().tolist() == pytest.approx([20.0] * 5, rel=1e-5)
    longer = silent_spellings(CtcHead(HeadTokens(2 * EMBEDDINGS, spellings(PIECES))))
    assert torch.equal(longer(EMBEDDINGS), head(EMBEDDINGS))


def test_a_spelling_holds_the_bytes_from_both_ends():
    found = spellings([" A", "naïvely long", ""])
    assert found.shape == (3, 16)
    assert found[0].tolist() == [33, 66, 0, 0, 0, 0, 0, 0, 66, 33, 0, 0, 0, 0, 0, 0]
    assert found[1].tolist() == [1 + b for b in "naïvely".encode()] + [1 + b for b in b"gnol yle"]
    assert not found[2].any()


def test_tokens_of_the_same_letters_share_what_their_spellings_score():
    head = CtcHead(HeadTokens(torch.zeros(5, 8), spellings(PIECES)))
    scores = head(torch.randn(3, 8))
    assert torch.isfinite(scores).all()  # embeddings of zeros have no direction
    spelled = head._spelled()
    assert torch.allclose(spelled[0] * 2**0.5, head.bytes[0, 66] + head.bytes[8, 66])
    assert torch.allclose(spelled[2] * 2, head.bytes[0, 66] + head.bytes[1, 67] + head.bytes[8, 67] + head.bytes[9, 66])


def test_runs_of_a_token_become_their_mean_and_blanks_disappear():
    path = torch.tensor([[0, 2, 2, 0, 2, 1], [0, 0, 0, 0, 1, 1]])
    scores = torch.nn.functional.one_hot(path, 3).float() * torch.arange(1.0, 7.0)[None, :, None]
    scores.requires_grad_()
    mean, mask = merge_runs(scores, mask_of([6, 4], 6), scores)
    assert mask.tolist() == [[True, True, True], [False, False, False]]  # the second row's token is padding
    assert mean[0].tolist() == [[0, 0, 2.5], [0, 0, 5], [0, 6, 0]]
    mean[0].sum().backward()
    assert scores.grad is not None
    assert scores.grad[0, :, 0].tolist() == [0, 0.5, 0.5, 0, 1, 1]
    assert not scores.grad[1].any()


def test_a_soft_token_is_the_embedding_of_a_certain_token():
    projector = build(temperature=1e-3)
    features = torch.randn(1, 40, 6)
    soft, mask = projector(features, torch.ones(1, 40, dtype=torch.bool))
    scores = projector.head(projector.token_vectors(features, torch.ones(1, 40, dtype=torch.bool))[0])
    said = best_path(scores, torch.ones(1, 10, dtype=torch.bool))[0]
    assert 0 < int(mask.sum()) == len(said) <= projector.soft_frames(40)
    assert torch.allclose(soft[0, : len(said)], EMBEDDINGS[[each - 1 for each in said]], atol=1e-3)


def test_an_utterance_of_blanks_becomes_one_learned_vector():
    projector = build()
    with torch.no_grad():
        projector.head.blank_bias.fill_(1e4)
    soft, mask = projector(torch.randn(2, 9, 6), mask_of([9, 4], 9))
    assert mask.tolist() == [[True], [True]]
    assert torch.equal(soft[:, 0], projector.silence.expand(2, -1))
    soft.sum().backward()
    assert projector.silence.grad is not None
    assert projector.silence.grad.tolist() == [2.0] * 8


def test_rows_depend_neither_on_padding_nor_on_each_other():
    projector = build()
    features = torch.randn(3, 31, 6)
    lengths = [31, 18, 3]
    soft, mask = projector(features, mask_of(lengths, 31))
    for row, frames in enumerate(lengths):
        alone, own = projector(features[row : row + 1, :frames], torch.ones(1, frames, dtype=torch.bool))
        assert own.sum() == mask[row].sum()
        assert torch.allclose(soft[row][mask[row]], alone[own], atol=1e-5)


def test_parameters_are_those_of_the_formula():
    for keys, extra in (({}, 257 * 17), ({"spelling": 0}, 0), ({"layers": 4, "spelling": 0}, 49 * 16)):
        c, h, d = 6, 16, 8
        base = (
            2 * c
            + (5 * c + 1) * h
            + (5 * h + 1) * h
            + (3 * h + 1) * h
            + 2 * (h + 1) * d
            + 2 * d
            + 2
            + (d + 16 * 257 + 1) * 128
        )
        assert sum(p.numel() for p in build(**keys).parameters()) == base + extra


def test_a_mixer_in_front_of_it_has_its_soft_tokens_its_head_and_gradients():
    inner = build()
    mixed, layers = MixedProjector(LayerMixer(2), inner), torch.randn(2, 1, 30, 6)
    mask = torch.ones(1, 30, dtype=torch.bool)
    soft, soft_mask = mixed(torch.cat([*layers], -1), mask)
    expected, expected_mask = inner(layers.mean(0), mask)
    assert soft_mask.sum() > 1
    torch.testing.assert_close(soft, expected)
    assert torch.equal(soft_mask, expected_mask)
    assert mixed.ctc_head() is inner.head
    mixed.train()
    vectors, steps = mixed.token_vectors(torch.cat([*layers], -1), mask)
    assert vectors.shape == (1, 8, 8)
    assert steps.all()
    vectors.sum().backward()
    assert mixed.mixer.logits.grad.abs().sum() > 0
    assert mixed.take_scores().keys() == {"tokens", "bytes"}


def test_scores_of_tokens_and_bytes_are_looked_at_any_time_and_taken_once():
    projector = build()
    projector(torch.randn(1, 8, 6), torch.ones(1, 8, dtype=torch.bool))
    shapes = {name: tuple(scores.shape) for name, (scores, _) in projector.last_scores().items()}
    assert shapes == {"tokens": (1, 2, 6), "bytes": (1, 4, 257)}
    assert projector.take_scores().keys() == shapes.keys()
    assert projector.take_scores() == projector.last_scores() == {}


def test_a_sharper_temperature_concentrates_a_soft_token():
    flat, sharp = build(temperature=10.0), build(temperature=0.01)
    features, mask = torch.randn(1, 30, 6), torch.ones(1, 30, dtype=torch.bool)
    distances = []
    for projector in (flat, sharp):
        soft, valid = projector(features, mask)
        distances.append(float(torch.cdist(soft[valid].detach(), EMBEDDINGS).min(1).values.mean()))
    assert distances[1] < 0.1 * distances[0]
    assert math.isfinite(distances[0])
