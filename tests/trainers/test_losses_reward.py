"""Reward losses and measures against literal values, closed forms and finite differences."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainers.phases.reward import loss

CHOSEN = torch.tensor([1.0, 0.5], dtype=torch.float64)
REJECTED = torch.tensor([0.2, 0.9], dtype=torch.float64)
SCORES = st.lists(st.tuples(st.floats(-20, 20), st.floats(-20, 20)), min_size=1, max_size=20)


def test_bradley_terry_literals():
    assert loss.bradley_terry(CHOSEN, REJECTED).mean().item() == pytest.approx(0.642058, abs=1e-6)
    assert loss.bradley_terry(CHOSEN, REJECTED, 0.3).mean().item() == pytest.approx(0.788632, abs=1e-6)
    assert 0.01 * loss.centering(CHOSEN, REJECTED).mean().item() == pytest.approx(0.017, abs=1e-9)


@given(SCORES, st.floats(-5, 5))
def test_bradley_terry_is_a_function_of_the_difference(scores, shift):
    chosen, rejected = torch.tensor(scores, dtype=torch.float64).unbind(1)
    moved = loss.bradley_terry(chosen + shift, rejected + shift)
    torch.testing.assert_close(loss.bradley_terry(chosen, rejected), moved, atol=1e-12, rtol=0)


@given(SCORES)
def test_gradient_is_minus_the_probability_of_the_wrong_order(scores):
    chosen, rejected = torch.tensor(scores, dtype=torch.float64).unbind(1)
    chosen.requires_grad_()
    loss.bradley_terry(chosen, rejected).sum().backward()
    torch.testing.assert_close(chosen.grad, -torch.sigmoid(rejected - chosen.detach()), atol=1e-12, rtol=1e-9)


def test_gradients_by_finite_differences():
    for function in (loss.bradley_terry, loss.centering):
        inputs = (CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_())
        assert torch.autograd.gradcheck(function, inputs)


def test_extreme_scores_stay_finite():
    value = loss.bradley_terry(torch.tensor([-1e4]), torch.tensor([1e4]))
    assert value.item() == pytest.approx(2e4)


def test_accuracy_counts_ties_half():
    assert loss.accuracy(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([0.0, 1.0, 1.0])).item() == pytest.approx(0.5)


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=20))
def test_accuracy_and_its_opposite_add_up_to_one(scores):
    chosen, rejected = torch.tensor(scores, dtype=torch.float64).unbind(1)
    assert (loss.accuracy(chosen, rejected) + loss.accuracy(rejected, chosen)).item() == pytest.approx(1)


def test_a_model_that_says_nothing_is_calibrated():
    assert loss.calibration_error(torch.zeros(8), torch.zeros(8)).item() == 0.0


def test_calibration_error_is_zero_when_confidence_is_accuracy():
    # Confidence 0.75 in every pair, and three of four pairs are right.
    difference = math.log(3.0) * torch.tensor([1.0, 1.0, 1.0, -1.0])
    assert loss.calibration_error(difference, torch.zeros(4)).item() == pytest.approx(0.0, abs=1e-6)


def test_calibration_error_of_a_sure_and_wrong_model_is_one():
    assert loss.calibration_error(torch.tensor([-50.0]), torch.tensor([50.0])).item() == pytest.approx(1.0)


def test_calibration_error_against_a_plain_count():
    generator = np.random.default_rng(0)
    chosen, rejected = generator.normal(0.5, 1, 500), generator.normal(0, 1, 500)
    confidence = 1 / (1 + np.exp(-np.abs(chosen - rejected)))
    right = chosen > rejected
    expected = 0.0
    for low in np.arange(0.5, 1.0, 0.05):
        inside = (confidence >= low) & (confidence < low + 0.05)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    found = loss.calibration_error(torch.tensor(chosen).float(), torch.tensor(rejected).float())
    assert found.item() == pytest.approx(expected, abs=1e-5)


def test_length_baseline_counts_ties_half():
    assert loss.length_baseline(torch.tensor([5, 3, 2, 7]), torch.tensor([4, 3, 9, 1])).item() == pytest.approx(0.625)


def test_correlation_is_pearsons():
    x, y = np.random.default_rng(1).normal(size=(2, 50))
    y = y + 0.5 * x
    found = loss.correlation(torch.tensor(x), torch.tensor(y)).item()
    assert found == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-6)
    assert loss.correlation(torch.ones(3), torch.tensor([1.0, 2.0, 3.0])).item() == 0.0
