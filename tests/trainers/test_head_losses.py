"""Losses with gradients formed in the forward pass, beside autograd's in float64 from the definitions."""

from types import SimpleNamespace

import head_processes
import pytest
import torch
from distributed.cells import FSDP, Way
from distributed.processes import succeed
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from trainers.core import head_losses
from trainers.core.head_losses import Beside, head_loss, head_values, pieces
from trainers.core.scoring import target_logprobs
from trainers.phases.distill.train import divergence

aten = torch.ops.aten
K, H, V = 23, 12, 31
SIZES = [4, 9, 1, 0, 7, 2]


def model_with(head: nn.Module, **config):
    text = SimpleNamespace(**config)
    return SimpleNamespace(get_output_embeddings=lambda: head, config=SimpleNamespace(get_text_config=lambda: text))


def linear(seed: int = 0, width: int = V, bias: bool = False, dtype=torch.float32) -> nn.Linear:
    torch.manual_seed(seed)
    head = nn.Linear(H, width, bias=bias)
    head.weight.data *= 4
    return head.to(dtype)


def inputs(seed: int = 1, count: int = K) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(count, H)


TARGETS = torch.randint(0, V, (K,), generator=torch.Generator().manual_seed(2))
WEIGHTS = torch.linspace(-0.5, 1.5, K)


def logprobs(temperature: float = 1.0):
    return target_logprobs(SimpleNamespace(target_ids=TARGETS), temperature)


def plain_logprobs(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    return (logits / temperature).log_softmax(-1).gather(-1, TARGETS[: len(logits), None]).squeeze(-1)


def weighted(values: torch.Tensor, at: slice) -> torch.Tensor:
    return (WEIGHTS[at].to(values) * values).sum()


def by_items(values: torch.Tensor, items: slice) -> torch.Tensor:
    """Of each item's sum, and no straight line, as a preference loss is."""
    sums = [part.sum() for part in values.split(SIZES[items])]
    return torch.stack([nn.functional.softplus(0.3 * s + i) for i, s in enumerate(sums, items.start)]).sum()


def exactly(loss, hidden: torch.Tensor, *weights: torch.Tensor):
    """Value and gradients of ``loss(hidden, *weights)`` by autograd in float64."""
    leaves = [t.detach().double().requires_grad_() for t in (hidden, *weights)]
    value = loss(*leaves)
    return value.detach(), torch.autograd.grad(value, leaves)


@pytest.fixture(params=[1, 3, 10, K], ids=lambda rows: f"{rows} rows")
def rows(request, monkeypatch) -> int:
    monkeypatch.setattr(head_losses, "CHUNK_ELEMENTS", request.param * V)
    return request.param


def check(found: tuple, head: nn.Module, hidden: torch.Tensor, expected: tuple) -> None:
    loss, _ = found
    (3 * loss).backward()
    value, gradients = expected
    assert_close(loss.detach().double(), value, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip((hidden, *head.parameters()), gradients, strict=True):
        assert_close(ours.grad.double() / 3, theirs, rtol=1e-5, atol=2e-6 * float(theirs.abs().max()))


SCALES = {
    "none": ({}, lambda z: z),
    "cohere": ({"logit_scale": 0.25}, lambda z: 0.25 * z),
    "granite": ({"logits_scaling": 3.0}, lambda z: z / 3),
    "falcon_h1": ({"lm_head_multiplier": 0.5}, lambda z: 0.5 * z),
    "gemma2": ({"final_logit_softcapping": 2.0}, lambda z: 2 * torch.tanh(z / 2)),
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_weighted_logprobs_are_autograds(rows, scale, temperature):
    config, scaled = SCALES[scale]
    head, hidden = linear(bias=scale == "none"), inputs().requires_grad_()
    found = head_loss(model_with(head, **config), hidden, logprobs(temperature), weighted)

    def plain(hidden, weight, bias=0):
        return weighted(plain_logprobs(scaled(hidden @ weight.T + bias), temperature), slice(0, K))

    expected = exactly(plain, hidden, *head.parameters())
    values = plain_logprobs(scaled(hidden @ head.weight.T + (head.bias if scale == "none" else 0)), temperature)
    assert_close(found[1], values.detach(), rtol=1e-5, atol=1e-5)
    assert not found[1].requires_grad
    check(found, head, hidden, expected)


def test_items_of_several_positions_are_autograds(rows):
    head, hidden = linear(), inputs().requires_grad_()
    found = head_loss(model_with(head), hidden, logprobs(), by_items, SIZES)
    plain = exactly(lambda h, w: by_items(plain_logprobs(h @ w.T), slice(0, len(SIZES))), hidden, head.weight)
    same = head_values(model_with(head), hidden, logprobs(), SIZES)
    assert torch.equal(found[1], same), "the same products, so that a model's ratio to itself is exactly 1"
    check(found, head, hidden, plain)


@pytest.mark.parametrize("width", [V, V - 4, V + 3])
@pytest.mark.parametrize("beta", [0, 0.5, 1])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergences_from_a_teacher_are_autograds(rows, beta, temperature, width):
    """Its head has other padding rows, and its hidden states another width than they need to."""
    head, teacher, hidden, theirs = linear(), linear(5, width), inputs().requires_grad_(), inputs(6)
    beside = Beside(model_with(teacher.requires_grad_(False)), theirs)
    found = head_loss(model_with(head), hidden, divergence(beta, temperature), weighted, beside=beside)
    log_p = ((theirs @ teacher.weight.T)[:, :V].double() / temperature).log_softmax(-1)

    def plain(hidden, weight):
        log_q = ((hidden @ weight.T)[:, :width] / temperature).log_softmax(-1)
        p, q = log_p.exp(), log_q.exp()
        if beta == 0:
            return weighted((p * (log_p - log_q)).sum(-1), slice(0, K))
        if beta == 1:
            return weighted((q * (log_q - log_p)).sum(-1), slice(0, K))
        log_m = (beta * p + (1 - beta) * q).log()
        kept = beta * (p * (log_p - log_m)).sum(-1) + (1 - beta) * (q * (log_q - log_m)).sum(-1)
        return weighted(kept, slice(0, K))

    log_q = ((hidden @ head.weight.T)[:, :width].double() / temperature).log_softmax(-1)
    assert_close(found[1][:, 1].double(), (log_p.exp() * (log_p - log_q)).sum(-1).detach(), rtol=1e-4, atol=1e-5)
    check(found, head, hidden, exactly(plain, hidden, head.weight))


def test_by_finite_differences(monkeypatch):
    monkeypatch.setattr(head_losses, "CHUNK_ELEMENTS", 5 * V)
    head, hidden = linear(), inputs().requires_grad_()
    model = model_with(head, final_logit_softcapping=3.0)

    def loss() -> torch.Tensor:
        return head_loss(model, hidden, logprobs(), by_items, SIZES)[0]

    loss().backward()
    for tensor in (hidden, head.weight):
        direction = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3))
        values = []
        for step in (1e-2, -1e-2):
            tensor.data += step * direction
            values.append(loss().item())
            tensor.data -= step * direction
        assert (values[0] - values[1]) / 2e-2 == pytest.approx((tensor.grad * direction).sum().item(), rel=2e-3)


# ---------------------------------------------------------------- what it costs


class Products(TorchDispatchMode):
    """Multiplications in products of matrices."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket in (aten.mm, aten.addmm, aten.addmm_):
            left, right = args[-2:]
            self.count += left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


def products(loss) -> float:
    """Products with the head, as multiples of one over all positions."""
    with Products() as made:
        loss().backward()
    return made.count / (K * H * V)


@pytest.mark.parametrize(("frozen", "count"), [(False, 3), (True, 2)])
def test_logits_are_computed_once(rows, frozen, count):
    """And where no gradient of the weights is wanted, none is computed."""
    head = linear().requires_grad_(not frozen)
    hidden = inputs().requires_grad_()
    assert products(lambda: head_loss(model_with(head), hidden, logprobs(), weighted)[0]) == count
    assert (head.weight.grad is None) == frozen


def test_a_larger_item_than_a_chunk_is_computed_twice(monkeypatch):
    monkeypatch.setattr(head_losses, "CHUNK_ELEMENTS", 7 * V)
    head, hidden = linear(), inputs().requires_grad_()
    found = products(lambda: head_loss(model_with(head), hidden, logprobs(), by_items, SIZES)[0])
    assert found == pytest.approx(3 + 9 / K), "one of nine positions, beside those that fit"


class Largest(TorchDispatchMode):
    """Of the tensors that are made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple) else (found,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return found


def test_no_tensor_has_all_positions_and_the_whole_vocabulary(monkeypatch):
    monkeypatch.setattr(head_losses, "CHUNK_ELEMENTS", 13 * V)
    head, hidden = linear(), inputs().requires_grad_()
    beside = Beside(model_with(linear(5)), inputs(6))
    with Largest() as largest:
        head_loss(model_with(head), hidden, divergence(0.5, 1.0), weighted, beside=beside)[0].backward()
    assert largest.numbers == 13 * V


def gathered_for_calls(head: nn.Linear) -> list[str]:
    """As FSDP and ZeRO do it: outside of the module's calls its weights are not there. Returns the list of calls."""
    whole, calls = head.weight.data, []

    def gather(*_) -> None:
        calls.append("call")
        head.weight.data = whole

    def release(*_) -> None:
        head.weight.data = torch.full_like(whole, torch.nan)

    head.register_forward_pre_hook(gather)
    head.register_forward_hook(release)
    release()
    return calls


def test_split_heads_are_gathered_for_one_call_each(rows):
    expected = []
    for split in (False, True):
        head, teacher, hidden = linear(), linear(5).requires_grad_(False), inputs().requires_grad_()
        calls = [gathered_for_calls(module) for module in (head, teacher) if split]
        beside = Beside(model_with(teacher), inputs(6))
        loss, values = head_loss(model_with(head), hidden, divergence(0.5, 1.0), weighted, beside=beside)
        loss.backward()
        expected.append((loss.detach(), values, hidden.grad, head.weight.grad))
        assert calls == [["call"]] * len(calls)
    assert all(torch.equal(a, b) for a, b in zip(*expected, strict=True))


def test_a_second_backward_pass_is_an_error():
    """The gradients were multiplied in place."""
    head, hidden = linear(), inputs().requires_grad_()
    loss, _ = head_loss(model_with(head), hidden, logprobs(), weighted)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---------------------------------------------------------------- heads of all kinds


def test_nothing_to_score_is_a_finite_zero_that_reaches_every_weight():
    head, hidden = linear(bias=True), inputs(count=0).requires_grad_()
    for sizes in (None, []):
        loss, values = head_loss(
            model_with(head), hidden, lambda logits, _: logits.sum(-1), lambda v, _: v.sum(), sizes
        )
        assert loss.item() == 0 and values.shape == (0,)
        head.zero_grad()
        loss.backward()
        assert not any(torch.count_nonzero(p.grad) for p in head.parameters())


def test_a_bf16_head_computes_in_fp32_and_rounds_its_gradient_once(rows):
    head, hidden = linear(dtype=torch.bfloat16), inputs().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = head_loss(model_with(head), hidden, logprobs(), weighted)
    loss.backward()
    plain = exactly(lambda h, w: weighted(plain_logprobs(h @ w.T), slice(0, K)), hidden, head.weight)
    assert_close(loss.detach().double(), plain[0], rtol=1e-5, atol=1e-6)
    for ours, theirs in zip((hidden.grad, head.weight.grad), plain[1], strict=True):
        assert ours.dtype == torch.bfloat16
        assert_close(ours.double(), theirs, rtol=2**-8, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_head_with_adapters_is_autograds(rows, dtype):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=H, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=4
    )
    model = LlamaForCausalLM(config).to(dtype)
    adapters = get_peft_model(model, LoraConfig(r=3, lora_alpha=6, target_modules=["lm_head"], init_lora_weights=False))
    head, hidden = adapters.base_model.model.get_output_embeddings(), inputs().requires_grad_()
    assert not isinstance(head, nn.Linear)
    found = head_loss(adapters.base_model.model, hidden, logprobs(), by_items, SIZES)
    a, b = head.lora_A["default"].weight, head.lora_B["default"].weight
    base = head.base_layer.weight.detach().double()

    def plain(hidden, a, b):
        return by_items(plain_logprobs(hidden @ (base + 2 * b @ a).T), slice(0, len(SIZES)))

    value, gradients = exactly(plain, hidden, a, b)
    found[0].backward()
    assert_close(found[0].detach().double(), value, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip((hidden, a, b), gradients, strict=True):
        assert_close(ours.grad.double(), theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))
    assert head.base_layer.weight.grad is None


def test_tied_heads_get_both_gradients(monkeypatch):
    """As transformers' own loss of a tied model gives them."""
    from trainers.core.batch import Sequence, collate
    from trainers.core.scoring import Scorer

    monkeypatch.setattr(head_losses, "CHUNK_ELEMENTS", 3 * V)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V, hidden_size=H, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=4
    )
    model = LlamaForCausalLM(config)
    model.set_output_embeddings(model.get_output_embeddings())
    model.lm_head.weight = model.model.embed_tokens.weight
    ids = TARGETS[:9]
    model(input_ids=ids[None], labels=ids[None]).loss.backward()
    expected = model.lm_head.weight.grad.clone()
    model.zero_grad()
    batch = collate([Sequence(ids.numpy(), ids.numpy() >= 0)], True, torch.device("cpu"))
    Scorer(model)(batch, target_logprobs(batch), lambda v, _: -v.mean() * len(v) / 8)[0].backward()
    assert_close(model.model.embed_tokens.weight.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("room", [1, 3, 7, 23, 50])
@pytest.mark.parametrize("sizes", [None, SIZES, [0], []])
def test_pieces_cover_every_position_and_item_once_and_in_order(sizes, room):
    count = K if sizes is None else sum(sizes)
    found = pieces(sizes, count, room)
    assert [i for items, _ in found for i in range(count if sizes is None else len(sizes))[items]] == list(
        range(count if sizes is None else len(sizes))
    )
    assert [i for _, chunks in found for at in chunks for i in range(at.start, at.stop)] == list(range(count))
    assert all(at.stop - at.start <= room for _, chunks in found for at in chunks)
    for items, chunks in found:
        size = sum(at.stop - at.start for at in chunks)
        assert size == (items.stop - items.start if sizes is None else sum(sizes[items]))
        assert len(chunks) == 1 or items.stop - items.start == 1, "only an item alone has several"


@pytest.mark.slow
def test_heads_that_fsdp_splits_get_the_gradients_of_whole_ones(tmp_path):
    succeed(Way(FSDP), head_processes.main, log=tmp_path / "log")
