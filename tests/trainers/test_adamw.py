"""AdamW with bf16 weights or moments: torch's numbers in fp32, and the right mean where it rounds."""

import pytest
import torch
from torch.testing import assert_close

from trainers.core import adamw
from trainers.core.adamw import RoundingAdamW, rounded
from trainers.spec import Optim

OPTIM = Optim(lr=1e-2, beta2=0.99)


def groups(*weights: torch.Tensor) -> list[dict]:
    return [{"params": [torch.nn.Parameter(w) for w in weights], "weight_decay": 0.1}]


def train(optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    """Gradients of a quadratic with noise, in the weights' own type."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for weight in optimizer.param_groups[0]["params"]:
            noise = torch.randn(weight.shape, generator=generator)
            weight.grad = (weight.detach().float() + noise).to(weight.dtype)
        optimizer.step()


def weights(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p.detach() for p in optimizer.param_groups[0]["params"]]


def test_in_fp32_it_is_torchs():
    start = [torch.randn(5, 3), torch.randn(4)]
    ours = RoundingAdamW(groups(*(w.clone() for w in start)), OPTIM, torch.float32)
    theirs = torch.optim.AdamW(groups(*(w.clone() for w in start)), lr=1e-2, betas=(0.9, 0.99), eps=1e-8)
    train(ours, 20)
    train(theirs, 20)
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("size", [1, 6, 7])
def test_some_rows_after_the_others_are_one_update(size, monkeypatch):
    """The very bits, whatever is worked out at once: rounding depends on places in the whole tensor."""
    start = [torch.randn(5, 3, 2), torch.randn(17), torch.randn(())]
    found = []
    for elements in (2**24, size):
        monkeypatch.setitem(adamw.PIECE_ELEMENTS, "cpu", elements)
        optimizer = RoundingAdamW(groups(*(w.bfloat16() for w in start)), OPTIM, torch.bfloat16)
        train(optimizer, 3)
        moments = [state["exp_avg_sq"] for state in optimizer.state.values()]
        found.append([*weights(optimizer), *moments])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("value", [0.02, -0.02, 1 + 2**-9, 3.0, -1e-30, 0.0])
def test_rounding_is_right_on_average_and_goes_to_a_neighbour(value):
    exact = torch.full((20_000,), value)
    found = rounded(exact, (1, 2, 3)).float()
    assert len(found.unique()) <= 2
    gap = abs(value) * 2**-7
    assert ((found - exact).abs() <= gap).all()
    assert abs((found.double() - exact.double()).mean().item()) <= 0.02 * gap, "4 standard errors are 0.014"


def test_steps_smaller_than_bf16_can_tell_still_add_up():
    """lr 1e-6 on weights of 0.02, whose neighbours are 1.2e-4 away: rounded to the nearest none of them moves."""
    start = torch.full((20_000,), 0.02, dtype=torch.bfloat16)
    tiny = Optim(lr=1e-6)
    optimizer = RoundingAdamW([{**groups(start.clone())[0], "weight_decay": 0.0}], tiny, torch.float32)
    nearest = torch.optim.AdamW(groups(start.clone()), lr=1e-6, weight_decay=0.0)
    for _ in range(100):
        for each in (optimizer, nearest):
            each.param_groups[0]["params"][0].grad = torch.ones(20_000, dtype=torch.bfloat16)
            each.step()
    assert (weights(nearest)[0] == start).all()
    moved = (weights(optimizer)[0].double() - start.double()).mean().item()
    assert moved == pytest.approx(-100e-6, rel=0.1)


def test_a_bf16_second_moment_falls_when_gradients_do():
    optimizer = RoundingAdamW(groups(torch.zeros(5_000)), Optim(lr=1e-9), torch.bfloat16)
    weight = optimizer.param_groups[0]["params"][0]
    for size in [1.0] * 200 + [0.0] * 300:
        weight.grad = torch.full_like(weight, size)
        optimizer.step()
    wanted = (1 - 0.999**200) * 0.999**300
    assert optimizer.state[weight]["exp_avg_sq"].dtype == torch.bfloat16
    assert optimizer.state[weight]["exp_avg_sq"].float().mean().item() == pytest.approx(wanted, rel=0.02)


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moments", [torch.float32, torch.bfloat16])
def test_loaded_state_goes_on_exactly(held, moments):
    whole, first = (
        RoundingAdamW(groups(torch.linspace(-1, 1, 50).reshape(5, 10).to(held)), OPTIM, moments) for _ in range(2)
    )
    train(whole, 3)
    train(first, 3)
    second = RoundingAdamW(groups(weights(first)[0].clone()), OPTIM, moments)
    loaded, saved = second.param_groups[0]["params"][0], first.state[first.param_groups[0]["params"][0]]
    second.state[loaded] = {name: tensor.clone() for name, tensor in saved.items()}
    train(whole, 3, seed=1)
    train(second, 3, seed=1)
    assert torch.equal(weights(whole)[0], weights(second)[0])
    assert second.state[second.param_groups[0]["params"][0]]["exp_avg"].dtype == moments


def test_a_part_of_a_tensor_is_rounded_as_in_the_whole():
    """So it does not matter how weights are split over processes."""
    whole = torch.linspace(-2, 2, 70_000)
    parts = [rounded(whole[:33_000], (5, 1, 0)), rounded(whole[33_000:], (5, 1, 0), start=33_000)]
    assert torch.equal(rounded(whole, (5, 1, 0)), torch.cat(parts))


@pytest.mark.parametrize("key", [(6, 1, 0), (5, 2, 0), (5, 1, 1)])
def test_steps_weights_and_moments_round_each_in_their_own_way(key):
    """Noise of two keys agrees as often as chance has it."""
    value = torch.full((200_000,), 1 + 2**-8)  # in the middle between two neighbours
    same = (rounded(value, (5, 1, 0)) == rounded(value, key)).double().mean().item()
    assert same == pytest.approx(0.5, abs=0.006)
    first, second = rounded(value, key).view(2, -1).float()
    assert (first == second).double().mean().item() == pytest.approx(0.5, abs=0.008), "nor do places repeat"
