"""Run on two processes: what only real processes show of a step, and of what they settle on before the first.

Prints nothing unless something is wrong.
"""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trainers import memory_room
from trainers.core.batch import Sequence
from trainers.core.flops import model_flops
from trainers.core.parallel import Workers
from trainers.core.scoring import Scorer, target_logprobs
from trainers.core.shares import over_ranks
from trainers.core.step import Layout, accumulate, scored
from trainers.core.trainee import Trainee
from trainers.memory_room import with_room
from trainers.phases.rollout.spec import RolloutSpec
from trainers.sizing.devices import CPU_RESERVE
from trainers.spec import Optim, Parallel

CONFIG = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
BATCH = [Sequence(np.arange(1, 9 + i % 5), np.ones(8 + i % 5, dtype=bool)) for i in range(13)]


def main() -> None:
    workers = Workers(Parallel(precision="bf16"))
    assert workers.world == 2
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG)
    trainee = Trainee(workers, Scorer(model), Optim(), 4, model_flops(model))
    exchanges, arithmetic = watch(trainee, model)
    meter = SimpleNamespace(part=lambda _: nullcontext(), count=lambda *_: None)
    ctx = SimpleNamespace(workers=workers, seed=0, meter=meter)

    def step(max_tokens: int) -> tuple[int, dict[str, float], list[torch.Tensor]]:
        exchanges.clear()
        layout = Layout(lambda sequence: [sequence], max_tokens, packing=True)

        def terms(_, micro):
            loss, _ = trainee.module(micro, target_logprobs(micro), lambda logprobs, _: -logprobs.sum() / 100)
            return loss, {"tokens": micro.counts().sum()}

        sums = accumulate(ctx, trainee, layout, 0, BATCH, terms)
        gradients = [p.grad.clone() for p in trainee.engine.parameters]
        trainee.engine.discard_gradients()
        return len(exchanges), sums, gradients

    def same_as(gradients: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
        return all((a - b).abs().max() < 2e-2 * b.abs().max() for a, b in zip(gradients, others, strict=True))

    step(1000)  # DDP puts its buckets in order after the first
    once, sums, gradients = step(1000)
    often, sums_of_many, gradients_of_many = step(20)
    assert 0 < once == often, f"{often} exchanges instead of {once}"
    assert sums["tokens"] == sums_of_many["tokens"] == sum(s.num_scored for s in BATCH)
    assert same_as(gradients_of_many, gradients)

    saved = {name: tensor.clone() for name, tensor in trainee.engine.saved()}
    step(20)
    trainee.engine.restore(lambda targets: [t.copy_(saved[name]) for name, t in targets.items()], saved)
    step(20)
    assert arithmetic == {torch.bfloat16}, arithmetic

    squares = over_ranks(workers, 7, lambda mine: [(workers.rank, i * i) for i in mine])
    assert squares == [(i % 2, i * i) for i in range(7)]
    assert over_ranks(workers, 1, lambda mine: [i + 5 for i in mine]) == [5], "one rank has nothing to do"
    layout = Layout(lambda sequence: [sequence], 20, packing=True)
    assert scored(workers, layout, BATCH, lambda some, _: [len(s) for s in some]) == [len(s) for s in BATCH]
    assert workers.from_main(lambda: workers.rank + 7) == 7
    assert rows_side_by_side(workers) == 8, "the smaller device decides, which is not the first one's"


def rows_side_by_side(workers: Workers) -> int:
    """Of 64 that may be, where the second process has room for ten, with one layer's twice, and the first one for all."""
    longest, new = 16, 4000
    row = 2 * 2 * 2 * 32 * (longest + new)  # keys and values in bf16, of two layers
    memory_room.machine_memory = lambda: workers.world * (CPU_RESERVE + [100, 10][workers.rank] * row * 3 // 2)
    tokenizer = {"trainOn": [{"files": "rows.jsonl"}], "vocabSize": 64}
    scratch = {"hiddenSize": 32, "numLayers": 2, "numHeads": 4, "maxPositions": 8192, "tokenizer": tokenizer}
    data = {"prompts": [{"files": "prompts.jsonl"}], "maxPromptLength": longest}
    document = {"policy": {"scratch": scratch}, "data": data, "sampling": {"maxNewTokens": new}}
    found = with_room(SimpleNamespace(spec=RolloutSpec.model_validate(document), workers=workers))
    rows = workers.gather_objects([found.sampling.batch_size])
    assert rows == rows[:1] * 2, rows
    return rows[0]


def watch(trainee: Trainee, model: LlamaForCausalLM) -> tuple[list[int], set[torch.dtype]]:
    """The buckets of gradients that are sent, and the types that a linear layer computes in."""
    exchanges: list[int] = []
    arithmetic: set[torch.dtype] = set()

    def send(_, bucket):
        exchanges.append(bucket.index())
        sent = torch.distributed.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
        return sent.then(lambda future: future.value()[0])

    trainee.module.register_comm_hook(None, send)
    model.model.layers[1].mlp.down_proj.register_forward_hook(lambda _, __, out: arithmetic.add(out.dtype))
    return exchanges, arithmetic
