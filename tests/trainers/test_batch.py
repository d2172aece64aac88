"""Packing, micro-batch plans, batch order: literals, properties, and equality with one sequence at a time."""

from collections import Counter
from itertools import product

import busy_ranks
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from trainers.core.batch import Sequence, collate, pack_rows, plan_micro_batches
from trainers.core.order import BatchOrder
from trainers.core.scoring import Scorer, head_logits, hidden_states, target_logprobs

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=30)
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
# A sliding window of four tokens and a low cap, so that both matter in sequences this short.
KINDS = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 2.0, "attn_logit_softcapping": 2.0},
}


def sequence(ids: list[int], scored_from: int = 0) -> Sequence:
    scored = np.zeros(len(ids), dtype=bool)
    scored[scored_from:] = True
    return Sequence(np.array(ids), scored)


def some_sequences(lengths: list[int], seed: int = 0) -> list[Sequence]:
    generator = np.random.default_rng(seed)
    return [sequence(generator.integers(1, 61, n).tolist(), scored_from=n // 3) for n in lengths]


# ---------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("lengths", "capacity", "rows"),
    [
        ([3, 4, 1], 4, [[1], [0, 2]]),
        # Chunks of [[1..5], [6, 7], [8..11], [12]] cut at four: the fullest row that still has room takes the next.
        ([4, 1, 2, 4, 1], 4, [[0], [3], [2, 1, 4]]),
        ([2, 2, 2], 4, [[0, 1], [2]]),
        ([], 4, []),
    ],
)
def test_best_fit_decreasing_literals(lengths, capacity, rows):
    assert pack_rows(lengths, capacity) == rows


def test_packed_ids_are_trls_literal():
    batch = collate([sequence([1, 2, 3]), sequence([4, 5, 6, 7]), sequence([8])], True, CPU)
    assert batch.input_ids.tolist() == [[4, 5, 6, 7], [1, 2, 3, 8]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 2, 0]]


@given(LENGTHS, st.integers(0, 20))
def test_no_row_is_too_long_and_every_sequence_is_in_one(lengths, spare):
    capacity = max(lengths) + spare
    rows = pack_rows(lengths, capacity)
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))


@given(LENGTHS)
def test_best_fit_leaves_at_most_one_row_half_empty(lengths):
    rows = pack_rows(lengths, max(lengths))
    assert sum(2 * sum(lengths[i] for i in row) <= max(lengths) for row in rows) <= 1


# ---------------------------------------------------------------- micro-batches


@given(
    st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=2), min_size=0, max_size=30),
    st.integers(1, 200),
    st.booleans(),
    st.integers(1, 4),
)
def test_a_plan_covers_a_step_once_within_the_budget(lengths, max_tokens, packing, world):
    plan = plan_micro_batches(lengths, max_tokens, packing, world)
    assert len(plan) == world
    assert len({len(groups) for groups in plan}) == 1, "ranks would wait for each other"
    assert sorted(i for groups in plan for group in groups for i in group) == list(range(len(lengths)))
    for group in (group for groups in plan for group in groups):
        sizes = [n for i in group for n in lengths[i]]
        cost = sum(sizes) if packing else len(sizes) * max(sizes, default=0)
        assert cost <= max_tokens or len(group) == 1


@given(st.lists(st.integers(1, 40), min_size=4, max_size=30), st.integers(1, 4))
def test_no_rank_is_idle_while_another_could_share(lengths, world):
    plan = plan_micro_batches([[n] for n in lengths], 10_000, True, world)
    assert all(any(groups) for groups in plan)


# ---------------------------------------------------------------- tensors


@given(LENGTHS, st.booleans())
def test_positions_point_at_the_right_tokens(lengths, packing):
    sequences = some_sequences(lengths)
    batch = collate(sequences, packing, CPU)
    flat = batch.input_ids.flatten()
    assert batch.num_tokens == sum(lengths)
    assert flat[batch.last_at].tolist() == [int(s.ids[-1]) for s in sequences]
    assert batch.target_ids.tolist() == [int(t) for s in sequences for t in s.ids[1:][s.scored[1:]]]
    assert flat[batch.scored_at].tolist() == [int(t) for s in sequences for t in s.ids[:-1][s.scored[1:]]]
    assert batch.counts().tolist() == [s.num_scored for s in sequences]
    assert batch.sums(torch.ones(len(batch.segment))).tolist() == [s.num_scored for s in sequences]


def test_a_batch_of_nothing_scores_nothing():
    batch = collate([], True, CPU)
    assert batch.input_ids.shape == (1, 1)
    assert len(batch.scored_at) == 0


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    torch.manual_seed(1)
    config = AutoConfig.for_model(request.param, **SIZES, **KINDS[request.param])
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data *= 4  # random weights are so small that a leak between sequences would hardly show
    return model


def gradient(model, sequences: list[Sequence], packing: bool) -> torch.Tensor:
    batch = collate(sequences, packing, CPU)
    model.zero_grad()
    Scorer(model)(batch, target_logprobs(batch), lambda found, _: found.sum())[0].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_packed_is_padded_is_alone(model):
    sequences = some_sequences([9, 3, 5, 1, 8, 2])
    alone = torch.cat([model(input_ids=torch.from_numpy(s.ids[None])).logits[0, :-1][s.scored[1:]] for s in sequences])
    for packing in (True, False):
        batch = collate(sequences, packing, CPU)
        ours = head_logits(model, hidden_states(model, batch)[batch.scored_at])
        torch.testing.assert_close(ours, alone, atol=1e-5, rtol=1e-5)


def test_gradients_do_not_depend_on_the_layout(model):
    sequences = some_sequences([9, 3, 5, 1, 8, 2])
    alone = sum(gradient(model, [s], packing=False) for s in sequences if s.num_scored)
    scale = alone.abs().max()
    for packing in (True, False):
        torch.testing.assert_close(gradient(model, sequences, packing) / scale, alone / scale, atol=1e-5, rtol=0)


ITEMS = st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=2), min_size=1, max_size=30)


@given(ITEMS, st.integers(1, 200), st.booleans(), st.integers(1, 8))
def test_work_is_spread_evenly(lengths, max_tokens, packing, world):
    """No rank waits that could work, and no rank has much more than another."""
    plan = plan_micro_batches(lengths, max_tokens, packing, world)
    empty = sum(not group for groups in plan for group in groups)
    assert empty == max(0, world * len(plan[0]) - len(lengths))
    tokens = [[sum(n for i in group for n in lengths[i]) for group in groups] for groups in plan]
    totals = [sum(groups) for groups in tokens]
    assert max(totals) - min(totals) <= max(max(groups) for groups in tokens)


@given(ITEMS, st.integers(1, 200), st.integers(1, 8))
def test_there_are_no_more_rounds_than_packing_needs(lengths, max_tokens, world):
    sizes = [sum(some) for some in lengths]
    rounds = len(plan_micro_batches(lengths, max_tokens, True, world)[0])
    assert rounds <= -(-len(pack_rows(sizes, max_tokens)) // world)
    assert rounds >= -(-sum(min(size, max_tokens) for size in sizes) // (max_tokens * world))


@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=40), st.integers(1, 8))
def test_the_largest_pass_could_give_nothing_away(costs, world):
    """Where tokens do not limit it, a pass with more work than another would have less without its smallest item."""
    plan = plan_micro_batches([[1]] * len(costs), 1000, True, world, costs)
    works = sorted(([costs[i] for i in group] for groups in plan for group in groups), key=sum)
    assert len(works) == world
    assert len(works[-1]) == 1 or sum(works[-1]) - min(works[-1]) <= sum(works[0]) + 1e-9


def test_ranks_share_work_and_not_tokens():
    """One sequence that costs as much as four others of its length: its rank has nothing else."""
    plan = plan_micro_batches([[10]] * 5, 1000, True, 2, [4.0, 1.0, 1.0, 1.0, 1.0])
    assert sorted(sorted(group) for groups in plan for group in groups) == [[0], [1, 2, 3, 4]]


@pytest.mark.parametrize("world", [2, 4, 8, 64])
@pytest.mark.parametrize(("max_tokens", "pairs"), [(4096, False), (8192, True), (32768, False)])
def test_ranks_are_busy_on_lengths_with_a_long_tail(world, max_tokens, pairs):
    for seed, per_rank in product(range(3), (16, 64)):
        lengths = busy_ranks.conversations(world * per_rank, seed, pairs)
        costs = busy_ranks.work(lengths)
        plan = plan_micro_batches(lengths, max_tokens, True, world, costs)
        assert busy_ranks.busy(plan, costs) > 0.95


def test_one_pass_too_many_is_not_left_to_one_rank():
    """Nine full passes for eight ranks: two rounds of half-full ones, not one rank with two and seven that wait."""
    plan = plan_micro_batches([[10]] * 72, 80, True, 8)
    assert {len(groups) for groups in plan} == {2}
    assert max(len(group) for groups in plan for group in groups) == 5
    assert {sum(map(len, groups)) for groups in plan} <= {7, 8, 9, 10}
    assert busy_ranks.busy(plan, [10.0] * 72) == 1.0


# ---------------------------------------------------------------- order


@given(st.integers(1, 50), st.integers(1, 20), st.integers(1, 4), st.integers(0, 5))
def test_every_epoch_shows_every_example_once(num_examples, batch_size, epochs, seed):
    order = BatchOrder(num_examples, batch_size, epochs, None, seed)
    shown = [i for step in range(order.total_steps) for i in order.indices(step)]
    assert len(shown) == epochs * num_examples
    for epoch in range(epochs):
        assert sorted(shown[epoch * num_examples : (epoch + 1) * num_examples]) == list(range(num_examples))


@given(st.integers(1, 30), st.integers(1, 20), st.integers(1, 12), st.floats(0.1, 3))
def test_max_steps_overrules_epochs(num_examples, batch_size, max_steps, epochs):
    order = BatchOrder(num_examples, batch_size, epochs, max_steps, 0)
    assert order.total_steps == max_steps
    shown = Counter(i for step in range(max_steps) for i in order.indices(step))
    assert sum(shown.values()) == max_steps * batch_size
    assert max(shown[i] for i in range(num_examples)) - min(shown[i] for i in range(num_examples)) <= 1


def test_an_order_is_a_function_of_seed_and_step():
    order = BatchOrder(100, 8, 2, None, 3)
    later = [order.indices(step) for step in (20, 3, 11)]
    assert [BatchOrder(100, 8, 2, None, 3).indices(step) for step in (20, 3, 11)] == later
    assert BatchOrder(100, 8, 2, None, 4).indices(3) != later[1]


def test_half_an_epoch():
    order = BatchOrder(10, 4, 0.5, None, 0)
    assert order.total_steps == 2
    assert [len(order.indices(step)) for step in range(2)] == [4, 1]


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 8), st.integers(0, 3))
def test_used_examples_are_those_that_the_steps_see(count, batch_size, steps, seed):
    order = BatchOrder(count, batch_size, 1, steps, seed)
    first = order.first_batches()
    assert {i for step in first for i in order.indices(step)} == {
        i for step in range(order.total_steps) for i in order.indices(step)
    }
    assert len(first) <= -(-count // batch_size)


@given(st.integers(1, 50), st.integers(1, 20), st.integers(1, 4))
def test_an_epoch_ends_with_the_step_that_shows_its_last_example(num_examples, batch_size, epochs):
    order = BatchOrder(num_examples, batch_size, epochs, None, 0)
    shown = 0
    for step in range(order.total_steps):
        before, shown = shown, shown + len(order.indices(step))
        assert order.ends_epoch(step) == (shown // num_examples > before // num_examples)
    assert order.ends_epoch(order.total_steps - 1)
