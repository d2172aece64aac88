"""Divergences, weights and streams of distillation against literals, TRL and identities."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from trainers.phases.distill.loss import PIECE_ELEMENTS, generalized_jsd, jsd_and_kl
from trainers.phases.distill.spec import RewardWeighting
from trainers.phases.distill.streams import Streams
from trainers.phases.distill.weights import MODES, correlation, reward_weights


def f64(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


Q, P = f64(1, 0, -1), f64(0, 2, 0)
logits = st.lists(st.floats(-200, 200, width=32), min_size=5, max_size=5)


def plain_divergence(q: torch.Tensor, p: torch.Tensor, beta: float) -> torch.Tensor:
    """By the definitions, from logits (V,) in float64."""
    log_q, log_p = (z - z.logsumexp(0) for z in (q, p))
    q, p = log_q.exp(), log_p.exp()
    if beta in (0, 1):
        possible, ratio = (p, log_p - log_q) if beta == 0 else (q, log_q - log_p)
        return (possible * ratio)[possible > 0].sum()
    m = beta * p + (1 - beta) * q
    return (
        beta * torch.xlogy(p, p / m.clamp(min=1e-300)).sum()
        + (1 - beta) * torch.xlogy(q, q / m.clamp(min=1e-300)).sum()
    )


class TestLiterals:
    """Computed once with TRL 1.16 in float64."""

    @pytest.mark.parametrize(
        ("beta", "value"),
        [
            (0, 1.757780),
            (1, 1.757780),
            (0.1, 0.146311),
            (0.9, 0.146311),
            (0.25, 0.285781),
            (0.75, 0.285781),
            (0.5, 0.368064),
        ],
    )
    def test_two_tokens(self, beta, value):
        student, teacher = f64(0.1, 0.9).log(), f64(0.9, 0.1).log()
        assert generalized_jsd(student[None], teacher[None], beta).item() == pytest.approx(value, abs=1e-6)

    @pytest.mark.parametrize(
        ("beta", "value"), [(0, 0.742033), (1, 0.917692), (0.1, 0.066166), (0.5, 0.187910), (0.9, 0.077236)]
    )
    def test_three_tokens(self, beta, value):
        assert generalized_jsd(Q[None], P[None], beta).item() == pytest.approx(value, abs=1e-6)

    def test_temperature_divides_both(self):
        assert generalized_jsd(Q[None], P[None], 1, temperature=2).item() == pytest.approx(0.224057, abs=1e-6)

    @pytest.mark.parametrize(
        ("beta", "gradient"),
        [(1, [0.608194, -0.510443, -0.097751]), (0, [0.558734, -0.542258, -0.016476])],
    )
    def test_gradients(self, beta, gradient):
        student = Q.clone().requires_grad_()
        generalized_jsd(student[None], P[None], beta).sum().backward()
        assert_close(student.grad, f64(*gradient), atol=1e-6, rtol=0)
        if beta == 0:
            assert_close(student.grad, Q.softmax(0) - P.softmax(0))


class TestDivergence:
    @pytest.mark.parametrize("beta", [0, 0.5, 1])
    def test_of_no_position_there_is_none(self, beta):
        """As of a pass in which a process has none of the batch's answers."""
        student = torch.randn(0, 50, requires_grad=True)
        value, kl = jsd_and_kl(student, torch.randn(0, 50), beta, 0.7)
        value.sum().backward()
        assert value.shape == kl.shape == (0,)
        assert student.grad.shape == (0, 50)

    @pytest.mark.parametrize("beta", [0, 0.05, 0.3, 0.5, 0.9, 1])
    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    def test_value_and_gradient_are_trls(self, beta, temperature):
        from trl.experimental.gkd import GKDTrainer

        torch.manual_seed(0)
        student, teacher = torch.randn(7, 50, dtype=torch.float64), 2 * torch.randn(7, 50, dtype=torch.float64)
        ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
        weights = torch.rand(7, dtype=torch.float64)
        value = generalized_jsd(ours, teacher, beta, temperature)
        wanted = GKDTrainer.generalized_jsd_loss(theirs, teacher, None, beta, temperature, "none").sum(-1)
        assert_close(value, wanted)
        (value * weights).sum().backward()
        (wanted * weights).sum().backward()
        assert_close(ours.grad, theirs.grad)

    @pytest.mark.parametrize("beta", [0, 0.3, 1])
    def test_gradient_by_finite_differences(self, beta):
        torch.manual_seed(0)
        student = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
        teacher = torch.randn(3, 5, dtype=torch.float64)
        assert torch.autograd.gradcheck(lambda z: generalized_jsd(z, teacher, beta, 1.5), (student,))

    @pytest.mark.parametrize("beta", [0, 0.3, 1])
    def test_positions_that_are_worked_on_apart_are_those_of_all_at_once(self, beta, monkeypatch):
        torch.manual_seed(0)
        student, teacher = torch.randn(7, 5), torch.randn(7, 5)
        student[2, 3] = teacher[2, 3] = -torch.inf
        student.requires_grad_()
        value, kl = jsd_and_kl(student, teacher, beta)
        (slope,) = torch.autograd.grad(value.sum(), student)
        monkeypatch.setitem(PIECE_ELEMENTS, "cpu", 3 * 5)
        in_pieces = jsd_and_kl(student, teacher, beta)
        assert_close(in_pieces, (value, kl))
        assert_close(torch.autograd.grad(in_pieces[0].sum(), student)[0], slope)

    @pytest.mark.parametrize("beta", [0, 0.1, 0.5, 1])
    def test_a_perfect_student_has_none(self, beta):
        student = torch.randn(4, 9).requires_grad_()
        value = generalized_jsd(student, student.detach() + 3.0, beta)  # softmax does not see a shift
        value.sum().backward()
        assert_close(value, torch.zeros(4), atol=1e-6, rtol=0)
        assert_close(student.grad, torch.zeros(4, 9), atol=1e-6, rtol=0)

    def test_only_the_middle_is_symmetric(self):
        def both(beta):
            return generalized_jsd(Q[None], P[None], beta).item(), generalized_jsd(P[None], Q[None], beta).item()

        assert both(0.5)[0] == pytest.approx(both(0.5)[1])
        assert both(0.1)[0] != pytest.approx(both(0.1)[1])

    def test_near_its_ends_it_is_beta_times_the_kl(self):
        assert generalized_jsd(Q[None], P[None], 1e-6).item() / 1e-6 == pytest.approx(0.742033, abs=1e-4)

    def test_extreme_logits_stay_finite(self):
        student = torch.tensor([[80.0, -80.0, 0.0]], requires_grad=True)
        for beta in (0, 0.5, 1):
            value = generalized_jsd(student, -student.detach(), beta)
            (grad,) = torch.autograd.grad(value.sum(), student)
            assert value.isfinite().all() and grad.isfinite().all()

    @given(logits, logits, st.sampled_from([0, 1e-6, 0.1, 0.5, 0.9, 1]), st.floats(0.1, 5))
    def test_it_is_finite_and_right_wherever_two_models_can_go(self, student, teacher, beta, temperature):
        """Probabilities underflow in fp32 from a distance of 104 on; the oracle is in float64 and works on ratios."""
        ours = torch.tensor([student], requires_grad=True)
        value = generalized_jsd(ours, torch.tensor([teacher]), beta, temperature)
        wanted = plain_divergence(f64(*student) / temperature, f64(*teacher) / temperature, beta)
        assert_close(value.double().squeeze(), wanted, atol=1e-3, rtol=1e-3)
        (grad,) = torch.autograd.grad(value.sum(), ours)
        assert grad.isfinite().all()
        assert abs(grad.sum().item()) < 1e-3 * (1 + grad.abs().max().item()), "softmax does not see a shift"

    @pytest.mark.parametrize("beta", [0, 0.3, 1])
    def test_what_both_models_exclude_adds_nothing(self, beta):
        excluded = torch.tensor([[-torch.inf]])
        with_it = generalized_jsd(*(torch.cat([z[None].float(), excluded], 1) for z in (Q, P)), beta)
        assert_close(with_it, generalized_jsd(Q[None].float(), P[None].float(), beta))

    def test_reverse_kl_is_the_expected_policy_gradient(self):
        """sum_v q_v grad log q_v (log q_v - log p_v) over a whole small vocabulary."""
        student = Q.clone().requires_grad_()
        log_q, log_p = student.log_softmax(0), P.log_softmax(0)
        surrogate = (log_q.exp().detach() * log_q * (log_q.detach() - log_p)).sum()
        (wanted,) = torch.autograd.grad(surrogate, student)
        (grad,) = torch.autograd.grad(generalized_jsd(student[None], P[None], 1).sum(), student)
        assert_close(grad, wanted)

    @pytest.mark.parametrize("beta", [0, 0.5, 1])
    def test_the_kl_beside_it_has_no_gradient(self, beta):
        student = Q.clone().requires_grad_()
        value, kl = jsd_and_kl(student[None], P[None], beta)
        assert value.requires_grad and not kl.requires_grad
        assert kl.item() == pytest.approx(0.742033, abs=1e-6)


rewards_of = st.lists(st.floats(-50, 50), min_size=1, max_size=20)
modes = st.sampled_from(sorted(MODES))


class TestWeights:
    def test_softmax_literal(self):
        weights = reward_weights(f64(1, 0, -1), RewardWeighting(mode="softmax"))
        assert_close(weights.values, f64(1.995723, 0.734185, 0.270092), atol=1e-6, rtol=0)

    def test_exp_is_exponential_in_standard_deviations(self):
        weights = reward_weights(f64(3, 1), RewardWeighting(temperature=2.0))
        assert_close(weights.values, 2 * f64(0.5, -0.5).softmax(0))

    def test_exp_counts_what_it_clips(self):
        weights = reward_weights(f64(0, 0, 0, 100), RewardWeighting(max_weight=2.0))
        raw = f64(*[math.exp(-(3**-0.5))] * 3, 2.0)
        assert_close(weights.values, raw / raw.mean())
        assert weights.clipped == 0.25

    def test_rank_shares_places(self):
        weights = reward_weights(f64(5, 7, 5, 1), RewardWeighting(mode="rank"))
        assert_close(weights.values, f64(2.5, 4, 2.5, 1) / 2.5)

    def test_filter_drops_a_share(self):
        weights = reward_weights(f64(1, 4, 2, 3), RewardWeighting(mode="filter", quantile=0.5))
        assert_close(weights.values, f64(0, 2, 0, 2))
        assert weights.effective_size == pytest.approx(2)

    @given(rewards_of, modes, st.floats(0.1, 10))
    def test_never_negative_and_one_on_average(self, rewards, mode, temperature):
        weights = reward_weights(f64(*rewards), RewardWeighting(mode=mode, temperature=temperature))
        assert (weights.values >= 0).all() and weights.values.isfinite().all()
        assert weights.values.mean().item() == pytest.approx(1)
        assert 1 - 1e-9 <= weights.effective_size <= len(rewards) + 1e-9
        if mode in ("none", "exp", "rank"):
            assert (weights.values > 0).all()

    @given(
        st.lists(st.floats(-3e38, 3e38), min_size=1, max_size=5), modes, st.sampled_from([5e-324, 1e-300, 1e-6, 1e300])
    )
    def test_finite_for_any_reward_and_temperature(self, rewards, mode, temperature):
        weights = reward_weights(f64(*rewards), RewardWeighting(mode=mode, temperature=temperature))
        assert weights.values.isfinite().all() and (weights.values >= 0).all()
        assert weights.values.mean().item() == pytest.approx(1)

    @given(st.lists(st.integers(-20, 20), min_size=1, max_size=20), modes, st.integers(-1000, 1000))
    def test_a_constant_added_to_rewards_changes_nothing(self, rewards, mode, shift):
        weighting = RewardWeighting(mode=mode)
        before = reward_weights(f64(*rewards), weighting).values
        assert_close(reward_weights(f64(*rewards) + shift, weighting).values, before, atol=1e-9, rtol=1e-9)

    @given(st.lists(st.integers(-20, 20), min_size=1, max_size=20), modes)
    def test_more_reward_never_weighs_less(self, rewards, mode):
        weights = reward_weights(f64(*rewards), RewardWeighting(mode=mode)).values
        ordered = weights[torch.tensor(rewards).argsort()]
        assert (ordered.diff() >= -1e-12).all()

    @pytest.mark.parametrize("mode", sorted(MODES))
    def test_equal_rewards_weigh_the_same(self, mode):
        weights = reward_weights(torch.full((5,), 0.1), RewardWeighting(mode=mode)).values
        assert_close(weights, torch.ones(5, dtype=torch.float64))

    def test_correlation(self):
        assert correlation(f64(1, 2, 3), torch.tensor([2, 4, 6])) == pytest.approx(1)
        assert correlation(f64(1, 1, 1), torch.tensor([2, 4, 6])) == 0


class TestStreams:
    @given(st.integers(0, 100), st.integers(1, 400))
    def test_the_share_is_exact(self, percent, steps):
        streams = Streams(percent / 100)
        chosen = [streams.on_policy(step) for step in range(steps)]
        assert sum(chosen) == steps * percent // 100

    @given(st.floats(0, 1))
    def test_each_stream_is_read_in_order(self, fraction):
        streams = Streams(fraction)
        seen = {True: 0, False: 0}
        for step in range(50):
            kind = streams.on_policy(step)
            assert streams.index(step) == seen[kind]
            seen[kind] += 1

    def test_ends(self):
        assert not any(Streams(0).on_policy(step) for step in range(20))
        assert all(Streams(1).on_policy(step) for step in range(20))

    @pytest.mark.parametrize(
        ("fraction", "steps", "missing"),
        [
            (0.5, 1, ["onPolicy"]),
            (0.5, 2, []),
            (0.25, 3, ["onPolicy"]),
            (0.99, 1, ["onPolicy"]),
            (1, 1, []),
            (0, 1, []),
        ],
    )
    def test_a_stream_that_gets_no_step_is_told(self, fraction, steps, missing):
        assert Streams(fraction).without_steps(steps) == missing

    @given(st.integers(0, 100), st.integers(1, 60))
    def test_as_many_steps_as_the_traces_need(self, percent, wanted):
        streams = Streams(percent / 100)
        total = streams.total_steps(wanted)
        off_policy = sum(not streams.on_policy(step) for step in range(total))
        assert off_policy == (wanted if percent < 100 else 0)
        assert percent == 100 or not streams.on_policy(total - 1), "ends with the last of them"
        assert percent < 100 or total == wanted
