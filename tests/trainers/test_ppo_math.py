"""PPO's estimators and losses against literals and identities."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from trainers.phases.ppo.advantages import explained_variance, gae, token_rewards, whiten
from trainers.phases.ppo.loss import adapted_coef, clipped, kl_estimate, policy_loss, value_loss


def row(*values) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def everything(x: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(x, dtype=torch.bool)


def masked(*flags) -> torch.Tensor:
    return torch.tensor([flags], dtype=torch.bool)


REWARDS, VALUES = row(-0.1, 0.05, -0.2, 1), row(0.5, 0.4, 0.3, 0.2)


class TestGae:
    def test_no_lambda(self):
        values = row(1, 2, 3)
        assert_close(gae(row(0, 0, 5), values, everything(values), 1, 0), row(1, 1, 2))

    def test_lambda_and_returns(self):
        advantages = gae(REWARDS, VALUES, everything(VALUES), 1, 0.95)
        assert_close(advantages, row(0.16765, 0.387, 0.46, 0.8))
        assert_close(advantages + VALUES, row(0.66765, 0.787, 0.76, 1.0))

    def test_gap_is_stepped_over(self):
        mask = masked(1, 1, 0, 1, 1)
        advantages = gae(row(0, 0, 0, 0, 1), row(0.1, 0.2, 999, 0.4, 0.5), mask, 0.99, 0.95)
        assert_close(advantages[mask], row(0.782324, 0.727618, 0.565250, 0.5)[0], atol=1e-6, rtol=0)
        without = row(0.1, 0.2, 0.4, 0.5)
        assert_close(advantages[mask], gae(row(0, 0, 0, 1), without, everything(without), 0.99, 0.95)[0])
        assert advantages[0, 2] == 0

    def test_padding_after_the_end_changes_nothing(self):
        padded = gae(
            torch.cat([REWARDS, row(7, 7)], 1), torch.cat([VALUES, row(9, 9)], 1), masked(1, 1, 1, 1, 0, 0), 1, 0.95
        )
        assert_close(padded, torch.cat([gae(REWARDS, VALUES, everything(VALUES), 1, 0.95), row(0, 0)], 1))

    @given(st.lists(st.tuples(st.floats(-5, 5), st.floats(-5, 5)), min_size=1, max_size=12))
    def test_without_discounts_it_is_reward_to_go_less_value(self, pairs):
        rewards, values = row(*[r for r, _ in pairs]), row(*[v for _, v in pairs])
        to_go = rewards.flip(1).cumsum(1).flip(1)
        assert_close(gae(rewards, values, everything(values), 1, 1), to_go - values)


class TestWhitening:
    def test_unbiased(self):
        whitened = whiten(gae(REWARDS, VALUES, everything(VALUES), 1, 0.95), everything(VALUES))
        assert_close(whitened, row(-1.090844, -0.254249, 0.024171, 1.320921), atol=1e-6, rtol=0)

    def test_padding_does_not_count(self):
        x = row(0.16765, 0.387, 999, 0.46, 0.8)
        whitened = whiten(x, masked(1, 1, 0, 1, 1))
        assert_close(whitened, row(-1.090844, -0.254249, 0, 0.024171, 1.320921), atol=1e-6, rtol=0)

    def test_the_mean_can_stay(self):
        x = row(1, 2, 3, 4)
        whitened = whiten(x, everything(x), shift_mean=False)
        assert whitened.mean().item() == pytest.approx(2.5) and whitened.var().item() == pytest.approx(1)

    def test_one_token_is_left_alone(self):
        assert_close(whiten(row(3, 9), masked(1, 0)), row(3, 0))


class TestTokenRewards:
    def test_the_score_is_on_the_last_real_token(self):
        mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0], [1, 0, 1, 0]], dtype=torch.bool)
        scores = torch.tensor([5.0, 6.0, 7.0, 8.0])
        rewards = token_rewards(torch.zeros(4, 4), mask, scores, 0.1)
        wanted = torch.zeros(4, 4)
        wanted[0, 1], wanted[1, 3], wanted[2, 0], wanted[3, 2] = 5, 6, 7, 8
        assert_close(rewards, wanted)

    def test_kl_is_paid_by_real_tokens_only(self):
        rewards = token_rewards(row(1, 2, 3), masked(1, 1, 0), torch.zeros(1, dtype=torch.float64), 0.5)
        assert_close(rewards, row(-0.5, -1, 0))


class TestKl:
    @pytest.mark.parametrize(
        ("logprob", "reference", "k1", "k3"), [(-1, 0, -1, math.e - 2), (-1, -15, 14, 13.000001), (-2, -2, 0, 0)]
    )
    def test_estimators(self, logprob, reference, k1, k3):
        for estimator, value in (("k1", k1), ("k3", k3)):
            assert kl_estimate(row(logprob), row(reference), estimator).item() == pytest.approx(value, abs=1e-6)

    def test_both_are_right_on_average(self):
        q, reference = row(1, 0, -1)[0].log_softmax(0), row(0, 2, 0)[0].log_softmax(0)
        kl = (q.exp() * (q - reference)).sum()
        for estimator in ("k1", "k3"):
            assert_close((q.exp() * kl_estimate(q, reference, estimator)).sum(), kl)

    @pytest.mark.parametrize("estimator", ["k1", "k3"])
    def test_one_very_unlikely_token_leaves_it_finite(self, estimator):
        found = kl_estimate(torch.tensor([-200.0, 0.0]), torch.tensor([0.0, -200.0]), estimator)
        assert found.isfinite().all() and found.sum().isfinite()

    @pytest.mark.parametrize(("kl", "coef"), [(12, 0.201024), (6, 0.2), (3, 0.198976)])
    def test_adaptive_coefficient(self, kl, coef):
        assert adapted_coef(0.2, kl, 6, 256, 10_000) == pytest.approx(coef)


class TestLosses:
    def test_policy_literal(self):
        loss = policy_loss(row(0.3, -0.3, 0.1), torch.zeros(1, 3).double(), row(1, 1, -1), 0.2)
        assert_close(loss, row(-1.2, -0.740818, 1.105171), atol=1e-6, rtol=0)

    def test_policy_gradient_stops_where_clipped(self):
        logprobs = row(0.3, -0.3, 0.3, -0.3).requires_grad_()
        policy_loss(logprobs, torch.zeros(1, 4).double(), row(1, 1, -1, -1), 0.2).sum().backward()
        assert_close(logprobs.grad, row(0, -math.exp(-0.3), math.exp(0.3), 0))

    def test_first_update_is_the_plain_policy_gradient(self):
        logprobs = row(-1, -2).requires_grad_()
        policy_loss(logprobs, logprobs.detach(), row(3, -4), 0.2).sum().backward()
        assert_close(logprobs.grad, row(-3, 4))

    def test_huge_ratios_stay_finite(self):
        assert policy_loss(row(0.0), row(-1e4), row(-1.0), 0.2).isfinite().all()

    def test_clipped(self):
        assert clipped(row(0.3, -0.3, 0.1), torch.zeros(1, 3).double(), 0.2).tolist() == [[1, 1, 0]]

    def test_value(self):
        # moved 1.0 from the old value towards the return: only 0.2 of it counts; then away from it: all counts.
        assert_close(value_loss(row(1.0, -1.0), row(0.0, 0.0), row(1.0, 1.0), 0.2), row(0.5 * 0.64, 0.5 * 4))

    def test_explained_variance(self):
        mask = masked(1, 1, 1, 0)
        assert explained_variance(row(1, 2, 3, 50), row(1, 2, 3, -9), mask) == 1
        assert explained_variance(row(1, 2, 3, 50), row(2, 2, 2, -9), mask) == 0
        assert explained_variance(row(1, 1, 1, 1), row(2, 3, 4, 5), mask) == 0
