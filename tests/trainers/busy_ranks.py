"""How busy a plan of micro-batches keeps ranks: ``make bench-balance`` prints the table.

Lengths are drawn, not read: lognormal with a median of 180 tokens and a standard deviation of the logarithm of 0.8, cut
to 16 and 1024 (mean 243), short conversations with a long tail as HH-RLHF has. A pair's second answer makes it some sixty
tokens longer or shorter. Work counts pairs of tokens as a model of width 1024 does, whose attention costs as much as
its weights at 12,288 tokens.
"""

import time
from collections.abc import Sequence as List
from itertools import product

import numpy as np

from trainers.core.batch import plan_micro_batches

WORLDS = (2, 4, 8, 64)
BUDGETS = (4096, 8192, 16384, 32768)


def conversations(count: int, seed: int, pairs: bool = False) -> list[list[int]]:
    """Tokens of each item's sequences."""
    drawn = np.random.default_rng(seed)
    first = np.exp(drawn.normal(np.log(180), 0.8, count))
    sides = [first, first + drawn.normal(0, 60, count)] if pairs else [first]
    return np.clip(np.stack(sides, axis=1), 16, 1024).astype(int).tolist()


def work(lengths: List[List[int]]) -> list[float]:
    """Of each item, in tokens' worth."""
    return [sum(n + n * n / 12_288 for n in some) for some in lengths]


def busy(plan: List[List[List[int]]], costs: List[float]) -> float:
    """Share of the ranks' time that is work, where in every round of passes all wait for the longest."""
    passes = [[sum(costs[i] for i in group) for group in groups] for groups in plan]
    return sum(map(sum, passes)) / (len(plan) * sum(max(some) for some in zip(*passes, strict=True)))


def reachable(costs: List[float], world: int) -> float:
    """No plan of one round is busier: it takes as long as the costliest item at least."""
    return min(1.0, sum(costs) / (world * max(costs)))


def main(seeds: int = 5) -> None:
    print("items      ranks  a rank  tokens a pass  passes  busy (mean, least)  one round's roof  plan, ms")
    for pairs, world, per_rank, budget in product((False, True), WORLDS, (4, 16, 64), BUDGETS):
        shares, rounds, roofs, spent = [], [], [], 0.0
        for seed in range(seeds):
            lengths = conversations(world * per_rank, seed, pairs)
            costs = work(lengths)
            began = time.process_time()
            plan = plan_micro_batches(lengths, budget, True, world, costs)
            spent += time.process_time() - began
            shares.append(busy(plan, costs))
            roofs.append(reachable(costs, world))
            rounds.append(len(plan[0]))
        print(
            f"{'pairs' if pairs else 'responses':9} {world:6} {per_rank:7} {budget:14,} {np.mean(rounds):7.1f}"
            f"  {np.mean(shares):9.1%}, {min(shares):6.1%} {np.mean(roofs):17.1%} {1000 * spent / seeds:9.1f}"
        )


if __name__ == "__main__":
    main()
