"""Preference losses against literal values, closed forms, finite differences, and TRL's own trainer."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainers.phases.dpo.loss import dpo_loss

# Policy -10 and -14, reference -11 and -12.5.
CHOSEN = torch.tensor([1.0], dtype=torch.float64)
REJECTED = torch.tensor([-1.5], dtype=torch.float64)
LENGTHS = torch.tensor([[4, 5]])
KINDS = ("sigmoid", "robust", "ipo", "hinge")
RATIOS = st.lists(st.tuples(st.floats(-30, 30), st.floats(-30, 30)), min_size=1, max_size=10)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"kind": "sigmoid"}, 0.575939),
        ({"kind": "sigmoid", "label_smoothing": 0.1}, 0.600939),
        ({"kind": "robust", "label_smoothing": 0.1}, 0.544689),
        ({"kind": "hinge"}, 0.75),
        ({"kind": "ipo", "length_normalize": False}, 6.25),
        ({"kind": "ipo"}, 19.8025),
    ],
)
def test_literals(settings, expected):
    assert dpo_loss(CHOSEN, REJECTED, LENGTHS, beta=0.1, **settings).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_policy_equal_to_its_reference(kind):
    expected = {"sigmoid": math.log(2), "robust": math.log(2), "ipo": 25.0, "hinge": 1.0}[kind]
    assert dpo_loss(CHOSEN * 0, REJECTED * 0, LENGTHS, kind, beta=0.1).item() == pytest.approx(expected)


@given(RATIOS, st.floats(0, 0.45))
def test_robust_undoes_label_noise_on_average(ratios, noise):
    """Natarajan et al. 2013: over flips with the assumed share, the expected loss is the loss on clean labels."""
    chosen, rejected = torch.tensor(ratios, dtype=torch.float64).unbind(1)
    lengths = torch.ones(len(ratios), 2)
    kept = dpo_loss(chosen, rejected, lengths, "robust", label_smoothing=noise)
    flipped = dpo_loss(rejected, chosen, lengths, "robust", label_smoothing=noise)
    clean = dpo_loss(chosen, rejected, lengths, "sigmoid")
    torch.testing.assert_close((1 - noise) * kept + noise * flipped, clean, atol=1e-9, rtol=1e-9)


@given(RATIOS, st.floats(0, 0.45))
def test_conservative_loss_is_the_expected_loss_under_flips(ratios, noise):
    chosen, rejected = torch.tensor(ratios, dtype=torch.float64).unbind(1)
    lengths = torch.ones(len(ratios), 2)
    expected = (1 - noise) * dpo_loss(chosen, rejected, lengths) + noise * dpo_loss(rejected, chosen, lengths)
    found = dpo_loss(chosen, rejected, lengths, label_smoothing=noise)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)


@given(RATIOS)
def test_sigmoid_gradient_in_closed_form(ratios):
    chosen, rejected = torch.tensor(ratios, dtype=torch.float64).unbind(1)
    chosen.requires_grad_()
    dpo_loss(chosen, rejected, torch.ones(len(ratios), 2), beta=0.3).sum().backward()
    expected = -0.3 * torch.sigmoid(-0.3 * (chosen.detach() - rejected))
    torch.testing.assert_close(chosen.grad, expected, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("normalize", [None, True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_finite_differences(kind, normalize):
    inputs = (CHOSEN.clone().requires_grad_(), REJECTED.clone().requires_grad_())
    assert torch.autograd.gradcheck(
        lambda c, r: dpo_loss(c, r, LENGTHS, kind, 0.3, 0.1 if kind in KINDS[:2] else 0.0, normalize), inputs
    )


@pytest.mark.parametrize("kind", KINDS)
def test_length_normalisation_is_division_first(kind):
    lengths = torch.tensor([[4, 5]])
    found = dpo_loss(CHOSEN, REJECTED, lengths, kind, length_normalize=True)
    expected = dpo_loss(CHOSEN / 4, REJECTED / 5, lengths, kind, length_normalize=False)
    torch.testing.assert_close(found, expected)


def test_extreme_ratios_stay_finite():
    value = dpo_loss(torch.tensor([-1e5]), torch.tensor([1e5]), torch.ones(1, 2), label_smoothing=0.1)
    assert value.isfinite().all()
