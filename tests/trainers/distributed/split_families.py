"""Run by torchrun: models of many families, whole and split. Prints a line of JSON for each: how far their gradients are apart.

Takes ``FOLDER=TYPE``, the type that weights are held in. An error is a model's line; both processes meet it, so the next
one can follow.
"""

import json
import sys

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from trainers.core.batch import Sequence, collate
from trainers.core.gathering import gathered, in_step
from trainers.core.layers import hold
from trainers.core.parallel import Workers
from trainers.core.scoring import Scorer, target_logprobs
from trainers.core.sharding import release, whole
from trainers.core.weights import read_model
from trainers.ending import exit_with
from trainers.spec import Parallel

SEQUENCES = [Sequence(np.arange(3, 12 + n), np.ones(9 + n, dtype=bool)) for n in (0, 4, 2)]


def gradients(workers: Workers, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Of the processes' mean loss."""
    batch = collate(SEQUENCES, False, workers.device)
    loss, _ = Scorer(model)(batch, target_logprobs(batch), lambda logprobs, _: -logprobs.sum())
    loss.backward()
    release(model)
    return {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}


def is_rounding(ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype) -> bool:
    """Gathered weights lie at other addresses, by which some processors' kernels add up in another order (Qwen3-Next's did)."""
    apart = (ours - theirs).abs().max() / theirs.abs().max()
    return bool(apart <= 4 * torch.finfo(dtype).eps)


def compared(workers: Workers, folder: str, dtype: torch.dtype) -> dict[str, float | str]:
    sharding = workers.trained_sharding
    split, _ = read_model(AutoModelForCausalLM, folder, dtype, False, sharding)
    alone, _ = read_model(AutoModelForCausalLM, folder, dtype, False)
    sharding.apply(split)
    hold(alone, dtype)
    theirs, ours = gradients(workers, alone), gradients(workers, split)
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    errors = {name: float((ours[name] - g).abs().max() / g.abs().max().clamp(min=1e-12)) for name, g in theirs.items()}
    worst = max(errors, key=lambda name: errors[name])
    ids = torch.arange(3, 9)[None]
    same = True
    for inside in (gathered, in_step):
        with torch.no_grad(), inside(split):
            logits = split(input_ids=ids).logits if workers.rank == 0 else None  # nobody waits inside
        same &= logits is None or is_rounding(logits, alone(input_ids=ids).logits, dtype)
    return {"error": errors[worst], "weight": worst, "generates": str(same)}


def main() -> None:
    torch.set_num_threads(1)
    workers = Workers(Parallel(strategy="fsdp"))
    for argument in sys.argv[1:]:
        folder, _, kind = argument.rpartition("=")
        try:
            found = compared(workers, folder, getattr(torch, kind))
        except Exception as error:
            found = {"problem": f"{type(error).__name__}: {error}"}
        if workers.is_main:
            print("FAMILY", json.dumps({"model": argument, **found}), flush=True)


if __name__ == "__main__":
    exit_with(main)
