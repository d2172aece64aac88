"""Products by oneDNN against torch's own, in values and gradients, and who multiplies so."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainers.core import products
from trainers.core.heads import is_plain
from trainers.core.products import Linear, add_gradient, hasten, linear, product


@pytest.fixture(autouse=True)
def by_onednn(monkeypatch):
    """Also where MKL is not slow, if torch has oneDNN at all."""
    assert torch.backends.mkldnn.is_available()
    monkeypatch.setattr(products, "mkl_is_slow", lambda: True)


def double(function, *tensors):
    """Values and gradients in double precision, which neither of the two has."""
    leaves = [t.detach().double().requires_grad_() for t in tensors]
    found = function(*leaves)
    found.square().sum().backward()
    return [found.detach().float(), *(leaf.grad.float() for leaf in leaves)]


def ours(inputs, weight, bias):
    leaves = [t.detach().clone().requires_grad_() for t in (inputs, weight, bias)]
    found = linear(*leaves)
    assert type(found.grad_fn).__name__ == "_LinearBackward"
    found.square().sum().backward()
    return [found.detach(), *(leaf.grad for leaf in leaves)]


@pytest.mark.parametrize("shape", [(130, 64), (1, 257, 64), (3, 100, 64), (1024, 1, 64)])
def test_values_and_gradients_are_those_of_exact_products(shape):
    torch.manual_seed(0)
    given = torch.randn(shape), torch.randn(260, 64), torch.randn(260)
    for found, exact in zip(ours(*given), double(nn.functional.linear, *given), strict=True):
        assert (found - exact).norm() <= 1e-6 * exact.norm()


def test_what_lies_in_another_order_is_multiplied_too():
    torch.manual_seed(0)
    left, right = torch.randn(64, 300).T, torch.randn(200, 64).T
    exact = left.double() @ right.double()
    torch.testing.assert_close(product(left, right).double(), exact, atol=1e-5, rtol=1e-5)
    one = torch.ones(1, requires_grad=True)
    weight = torch.randn(200, 64, requires_grad=True)
    (linear(torch.ones(300, 64), weight).sum() * one).backward()  # a gradient that is one number, expanded
    torch.testing.assert_close(weight.grad, torch.full((200, 64), 300.0))


def test_a_gradient_is_added_to_what_is_there(monkeypatch):
    monkeypatch.setattr(products, "BLOCK", 96)
    torch.manual_seed(0)
    slope, inputs, total = torch.randn(301, 200), torch.randn(301, 64), torch.randn(200, 64)
    exact = total.double() + slope.double().T @ inputs.double()
    add_gradient(total, slope, inputs)
    torch.testing.assert_close(total.double(), exact, atol=1e-4, rtol=1e-4)


def test_scores_without_gradients_are_exactly_those_of_training():
    torch.manual_seed(0)
    layer, inputs = Linear(64, 256), torch.randn(1, 301, 64)
    with torch.no_grad():
        scored = layer(inputs)
    assert torch.equal(scored, layer(inputs))
    assert torch.equal(scored, checkpoint(layer, inputs, use_reentrant=False))


def test_a_result_can_be_changed_in_place_as_torchs_own():
    layer = Linear(64, 256)
    layer(torch.randn(301, 64)).add_(1).sum().backward()
    assert torch.isfinite(layer.weight.grad).all()


def test_frozen_weights_keep_no_inputs_and_get_no_gradient():
    layer = Linear(64, 256).requires_grad_(False)
    inputs = torch.randn(301, 64, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        found = layer(inputs)
    assert [t.shape for t in saved] == [layer.weight.shape]
    found.sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(inputs.grad, layer.weight.sum(0).expand(301, 64), atol=1e-4, rtol=1e-4)


def test_few_shapes_reach_onednn():
    """Each one is a program that it makes and keeps."""
    counts = [n + -n % products.step(n) for n in range(1, 4097)]
    assert all(0 <= filled - n <= n / 8 for n, filled in enumerate(counts, start=1))
    assert len({n for n in counts if n > 512}) == 3 * 8


def test_plain_layers_alone_are_hastened():
    class Other(nn.Linear):
        """Weights packed in bits are of such classes."""

    model = nn.ModuleDict({"plain": nn.Linear(8, 8), "other": Other(8, 8), "norm": nn.LayerNorm(8)})
    hasten(model)
    assert [type(model[name]) for name in model] == [Linear, Other, nn.LayerNorm]
    assert is_plain(model["plain"])
    assert type(copy.deepcopy(model)["plain"]) is Linear
    assert list(model["plain"].state_dict()) == ["weight", "bias"]


def test_nothing_changes_where_mkl_is_not_slow(monkeypatch):
    monkeypatch.setattr(products, "mkl_is_slow", lambda: False)
    model = nn.Sequential(nn.Linear(64, 256))
    hasten(model)
    assert type(model[0]) is nn.Linear
    inputs = torch.randn(301, 64)
    assert torch.equal(linear(inputs, model[0].weight), nn.functional.linear(inputs, model[0].weight))


@pytest.mark.parametrize(("wide", "intels", "slow"), [(True, False, True), (True, True, False), (False, False, False)])
def test_mkl_is_slow_on_wide_processors_of_others(monkeypatch, wide, intels, slow):
    monkeypatch.undo()
    monkeypatch.setattr(products, "_is_wide", lambda: wide)
    monkeypatch.setattr(products, "_is_intels", lambda: intels)
    products.mkl_is_slow.cache_clear()
    assert products.mkl_is_slow() is slow
    products.mkl_is_slow.cache_clear()


def test_small_products_halves_and_autocast_are_torchs():
    def kind(inputs, weight):
        return type(linear(inputs, weight.requires_grad_()).grad_fn).__name__

    assert kind(torch.randn(3, 64), torch.randn(64, 64)) != "_LinearBackward"
    assert kind(torch.randn(512, 64).bfloat16(), torch.randn(256, 64).bfloat16()) != "_LinearBackward"
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(512, 64), torch.randn(256, 64)).dtype == torch.bfloat16
