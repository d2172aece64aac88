"""One draw by one uniform number, against the running sum in doubles that it stands for."""

import pytest
import torch

from trainers.core.sampling import LIKELIEST, WIDENING, drawn, sample, warped
from trainers.spec import Sampling


def weights_of(rows: int, vocabulary: int, seed: int) -> torch.Tensor:
    """Spread over many magnitudes, a third of them nothing, and a row of one token alone."""
    generator = torch.Generator().manual_seed(seed)
    weights = (4 * torch.randn(rows, vocabulary, generator=generator)).exp()
    weights[torch.rand(rows, vocabulary, generator=generator) < 0.3] = 0
    weights[0] = 0
    weights[:, vocabulary // 2] += 1e-3
    return weights


@pytest.mark.parametrize("vocabulary", [1, 5, 127, 128, 129, 1000, 5000])
def test_a_draw_is_where_the_running_sum_passes_its_share(vocabulary):
    weights = weights_of(40, vocabulary, vocabulary)
    sums = weights.double().cumsum(-1) / weights.double().sum(-1, keepdim=True)
    inner = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for uniforms in (inner, torch.zeros(40).double(), torch.full((40,), 1 - 2**-53, dtype=torch.float64)):
        token = drawn(weights, uniforms)[:, None]
        after = sums.gather(-1, token)
        before = after - weights.gather(-1, token) / weights.double().sum(-1, keepdim=True)
        assert (weights.gather(-1, token) > 0).all()
        assert (before <= uniforms[:, None] + 1e-6).all() and (uniforms[:, None] <= after + 1e-6).all()


def test_even_steps_of_the_uniform_number_give_every_token_its_share():
    weights = weights_of(2, 300, 0)[1:]
    uniforms = (torch.arange(20000).double() + 0.5) / 20000
    counts = torch.bincount(drawn(weights.expand(20000, -1), uniforms), minlength=300)
    assert (counts - 20000 * weights[0] / weights.sum()).abs().max() <= 1.01


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_k=9), Sampling(top_p=0.8)])
def test_a_draw_depends_on_its_own_row_alone(sampling):
    logits = 3 * torch.randn(33, 1000, generator=torch.Generator().manual_seed(0))
    uniforms = torch.rand(33, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    together, _ = sample(logits, sampling, uniforms)
    assert [int(sample(logits[[i]], sampling, uniforms[[i]])[0]) for i in range(33)] == together.tolist()


def test_a_large_vocabulary_keeps_its_tail():
    """In single precision a running sum over so many tokens stands still before the end."""
    weights = torch.ones(1, 2_000_000)
    assert drawn(weights, torch.tensor([0.9999], dtype=torch.float64)).item() == pytest.approx(1_999_800, abs=1)


@pytest.mark.parametrize("vocabulary", [5, 200])
def test_what_is_no_number_gives_a_token_all_the_same(vocabulary):
    """Whoever samples says so at the end, and until then the token is read."""
    logits = torch.full((3, vocabulary), float("nan"))
    token, logprobs = sample(logits, Sampling(), torch.rand(3, dtype=torch.float64))
    assert (token < vocabulary).all() and not logprobs.isfinite().any()


def test_a_nucleus_of_any_size_is_found_whatever_its_neighbours_are_like():
    """Of a few tokens, of more than are looked at first, and of nearly all: against each row put in order alone."""
    sharpness = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.1]).repeat(4)[:, None]
    logits = sharpness * torch.randn(20, 5000, generator=torch.Generator().manual_seed(0))
    found = warped(logits, Sampling(top_p=0.9))
    sizes = set()
    for row, kept in zip(logits, found, strict=True):
        ordered = row.double().softmax(-1).sort(descending=True)
        size = 1 + int((ordered.values.cumsum(-1) < 0.9).sum())
        assert set(kept.isfinite().nonzero().flatten().tolist()) == set(ordered.indices[:size].tolist())
        assert torch.equal(kept[kept.isfinite()], row[kept.isfinite()])
        sizes.add(size > LIKELIEST and 1 + (size > LIKELIEST * WIDENING))
    assert sizes == {0, 1, 2}


HOW = [
    Sampling(),
    Sampling(temperature=0),
    Sampling(temperature=0.7),
    Sampling(temperature=3.0),
    Sampling(top_k=9),
    Sampling(top_p=0.8),
    Sampling(temperature=0.5, top_k=20, top_p=0.9),
]


@pytest.mark.parametrize("num_known", [None, 900])
@pytest.mark.parametrize("sampling", HOW)
def test_log_probabilities_are_the_models_own_however_it_was_sampled(sampling, num_known):
    """Also where tokens that are never chosen are likelier than a sum in single precision can hold beside others."""
    logits = 3 * torch.randn(50, 1000, generator=torch.Generator().manual_seed(0))
    logits[:, 900:] += 120 if num_known else 0
    uniforms = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    token, logprobs = sample(logits, sampling, uniforms, num_known)
    wanted = logits.double().log_softmax(-1).gather(-1, token[:, None])[:, 0]
    assert num_known is None or (token < num_known).all()
    assert torch.allclose(logprobs.double(), wanted, rtol=1e-6, atol=3e-6)
