"""Importance weights: their closed form, what they are for, and their metrics."""

import math

import pytest
import torch
from torch.testing import assert_close

from trainers.contract import BadInput
from trainers.core.importance import prefix_importance, sampler_logprobs, token_importance
from trainers.core.rollouts import Prompt, Sample

# Ratios 1/2, 3 and 1; then 2, 1/4 and nothing.
POLICY = torch.tensor([[0.1, 0.6, 0.5], [0.8, 0.1, 1.0]]).log()
SAMPLER = torch.tensor([[0.2, 0.2, 0.5], [0.4, 0.4, 0.01]]).log()
MASK = torch.tensor([[True, True, True], [True, True, False]])


def test_of_tokens_by_hand():
    found = token_importance(POLICY, SAMPLER, MASK, cap=2.5)
    assert_close(found.weights, torch.tensor([[0.5, 2.5, 1.0], [2.0, 0.25, 0.0]]))
    ratios = [0.5, 3, 1, 2, 0.25]
    mismatch = sum(r - 1 - math.log(r) for r in ratios) / 5
    assert found.measures == pytest.approx(
        {"mismatch": mismatch, "importance_weight": 6.25 / 5, "importance_truncated": 1 / 5}, abs=1e-6
    )


def test_of_prefixes_by_hand():
    """The product over the tokens before, cut off as a whole: what a later token brings back below the cap counts."""
    policy, sampler = torch.tensor([[0.6, 0.1, 0.5]]).log(), torch.tensor([[0.2, 0.2, 0.5]]).log()
    found = prefix_importance(policy, sampler, torch.ones(1, 3, dtype=torch.bool), cap=2.0)
    assert_close(found.weights, torch.tensor([[1.0, 2.0, 1.5]]))
    assert found.measures["importance_truncated"] == pytest.approx(1 / 3)
    assert_close(
        prefix_importance(POLICY, SAMPLER, MASK, 9.0).weights, torch.tensor([[1.0, 0.5, 1.5], [1.0, 2.0, 0.0]])
    )


def test_alike_weighs_nothing():
    for weigh in (token_importance, prefix_importance):
        found = weigh(POLICY, POLICY, MASK, 2.0)
        assert_close(found.weights, MASK.float())
        assert found.measures == {"mismatch": 0, "importance_weight": 1, "importance_truncated": 0}


def test_without_a_cap_it_is_measured_alone():
    found = token_importance(POLICY, SAMPLER, MASK, None)
    assert found.weights is None
    assert found.measures == {"mismatch": token_importance(POLICY, SAMPLER, MASK, 2.0).measures["mismatch"]}


def test_what_the_sampler_thought_impossible_stays_finite():
    impossible = torch.full_like(POLICY, -1e4)
    for weigh in (token_importance, prefix_importance):
        for policy, sampler in ((POLICY, impossible), (impossible, SAMPLER)):
            found = weigh(policy, sampler, MASK, 2.0)
            assert found.weights.isfinite().all() and all(map(math.isfinite, found.measures.values()))


def test_weighed_samples_of_one_chain_have_the_expectation_of_another():
    """All sequences of three tokens, each as often as the sampler says it: sums are exact, whatever the function."""
    torch.manual_seed(0)
    vocabulary, length = 3, 3
    sequences = torch.cartesian_prod(*[torch.arange(vocabulary)] * length)
    heads = (
        torch.randn(2, vocabulary + 1, vocabulary).double().log_softmax(-1)
    )  # the next token by the last; row 3: none
    before = torch.cat([torch.full((len(sequences), 1), vocabulary), sequences[:, :-1]], 1)
    policy, sampler = (head[before, sequences] for head in heads)
    of_state = torch.randn(vocabulary + 1).double()[before]
    mask = torch.ones_like(sequences, dtype=torch.bool)

    def expected(logprobs, values):
        return (logprobs.sum(1).exp()[:, None] * values).sum()

    weights = prefix_importance(policy, sampler, mask, 1e6).weights.double()
    assert_close(expected(sampler, weights * of_state), expected(policy, of_state), atol=1e-6, rtol=0)
    # Of a token by itself: right for the first one, whose state both share.
    of_action = torch.randn(vocabulary).double()[sequences]
    weights = token_importance(policy, sampler, mask, 1e6).weights.double()
    first = slice(0, 1)
    assert_close(
        expected(sampler, (weights * of_action)[:, first]), expected(policy, of_action[:, first]), atol=1e-6, rtol=0
    )


def test_what_samplers_say_is_laid_side_by_side():
    prompt = Prompt({"prompt": "a"}, [1])
    said = [Sample(prompt, [2, 3], "", True, logprobs=[-0.5, -1.5]), Sample(prompt, [4], "", False, logprobs=[-2.0])]
    assert sampler_logprobs(said, 3).tolist() == [[-0.5, -1.5, 0], [-2.0, 0, 0]]
    with pytest.raises(BadInput, match="log-probabilities"):
        sampler_logprobs([Sample(prompt, [2], "", True)], 3)
