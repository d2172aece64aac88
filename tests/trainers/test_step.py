"""What a step is: the same sum however it is cut, one exchange, precision around every pass."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import step_processes
import torch
from distributed.cells import DDP, Way
from distributed.processes import succeed
from one_rank import OneRank
from transformers import LlamaConfig, LlamaForCausalLM

from trainers.contract import Diverged
from trainers.core.batch import Sequence
from trainers.core.flops import model_flops
from trainers.core.scoring import Scorer, target_logprobs
from trainers.core.step import Layout, accumulate, in_eval_mode, measured, scored


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


def some_sequences(count: int) -> list[Sequence]:
    drawn = np.random.default_rng(1)
    found = [drawn.integers(1, 64, drawn.integers(2, 12)) for _ in range(count)]
    return [Sequence(ids, drawn.random(len(ids)) < 0.7) for ids in found]


def step(model, sequences, rank=0, world=1, max_tokens=1000, packing=True, step=0, measures=None):
    """The sums and gradients that one rank adds, what it counted, and in which passes gradients were exchanged."""
    workers, counted = OneRank(rank, world), []
    meter = SimpleNamespace(part=lambda _: nullcontext(), count=lambda *work: counted.append(work))
    trainee = SimpleNamespace(module=Scorer(model), engine=workers, flops=model_flops(model))
    layout = Layout(lambda sequence: [sequence], max_tokens, packing)

    def terms(some, micro):
        assert len(some) in (micro.num_sequences, 0)
        loss, _ = trainee.module(micro, target_logprobs(micro), lambda logprobs, _: -logprobs.sum())
        return loss, measures or {"n": micro.counts().sum()}

    model.zero_grad()
    ctx = SimpleNamespace(workers=workers, seed=0, meter=meter)
    sums = accumulate(ctx, trainee, layout, step, sequences, terms)
    return sums, [p.grad.clone() for p in model.parameters()], counted, workers.last


def by_hand(model, sequences):
    """Sum of transformers' own cross-entropy, sequence by sequence, and its gradients."""
    model.zero_grad()
    total = 0.0
    for s in sequences:
        labels = torch.from_numpy(np.where(s.scored, s.ids, -100))[None]
        if s.num_scored:
            loss = model(input_ids=torch.from_numpy(s.ids)[None], labels=labels).loss * s.num_scored
            loss.backward()
            total += loss.item()
    return total, [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize(
    ("count", "world", "max_tokens", "packing"),
    [(9, 1, 1000, True), (9, 1, 16, True), (9, 1, 16, False), (9, 3, 20, True), (9, 4, 8, False), (2, 3, 1000, True)],
)
def test_ranks_and_passes_add_up_to_transformers_own_gradients(model, count, world, max_tokens, packing):
    sequences = some_sequences(count)
    expected, gradients = by_hand(model, sequences)
    parts = [step(model, sequences, rank, world, max_tokens, packing) for rank in range(world)]
    assert sum(sums["loss"] for sums, *_ in parts) == pytest.approx(expected, rel=1e-5)
    assert sum(sums["n"] for sums, *_ in parts) == sum(s.num_scored for s in sequences)
    for i, gradient in enumerate(gradients):
        torch.testing.assert_close(sum(part[1][i] for part in parts), gradient, atol=1e-4, rtol=1e-4)
    tokens, samples, flops = (sum(part) for part in zip(*(w for part in parts for w in part[2]), strict=True))
    assert (tokens, samples) == (sum(map(len, sequences)), count)
    assert flops == pytest.approx(
        model_flops(model).training([len(s) for s in sequences], sum(s.num_scored for s in sequences))
    )


def test_every_rank_has_the_same_passes_and_exchanges_in_the_last(model):
    found = [step(model, some_sequences(9), rank, 4, 12)[3] for rank in range(4)]
    assert len({len(last) for last in found}) == 1 and len(found[0]) > 1
    assert all(last == [False] * (len(last) - 1) + [True] for last in found)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_sum_that_is_not_finite_is_divergence(model, value):
    with pytest.raises(Diverged, match=r"step 8: margin is (nan|inf)"):
        step(model, some_sequences(2), step=7, measures={"margin": torch.tensor(value)})


def test_measures_and_scores_are_those_of_single_sequences(model):
    """Without dropout, which the model has in training mode."""
    sequences = some_sequences(8)
    alone = []
    with torch.no_grad(), in_eval_mode(model):
        for s in sequences:
            logits = model(input_ids=torch.from_numpy(s.ids)[None]).logits[0].log_softmax(-1)
            alone.append(sum(logits[t - 1, s.ids[t]].item() for t in range(1, len(s)) if s.scored[t]))
    dropping = torch.nn.Sequential(Scorer(model), torch.nn.Dropout(0.9)).train()

    def sums(micro):
        return micro.sums(dropping[1](dropping[0](micro, target_logprobs(micro))))

    layout, workers = Layout(lambda sequence: [sequence], 16, packing=True), OneRank(0, 1)
    found = measured(
        SimpleNamespace(workers=workers), dropping, layout, sequences, lambda _, micro: {"sum": sums(micro).sum()}
    )
    assert found["sum"] == pytest.approx(sum(alone), rel=1e-5)
    assert dropping.training and dropping[1].training, "the mode before comes back"
    with in_eval_mode(dropping):
        scores = scored(workers, layout, sequences, lambda some, micro: sums(micro).tolist())
    assert scores == pytest.approx(alone, abs=1e-4)


def test_the_mode_comes_back_after_an_error(model):
    model.train()
    with pytest.raises(KeyError), in_eval_mode(model):
        assert not model.training
        raise KeyError
    assert model.training


@pytest.mark.slow
def test_two_processes_exchange_once_a_step_and_stay_in_bf16(tmp_path):
    succeed(Way(DDP), step_processes.main, log=tmp_path / "log")
