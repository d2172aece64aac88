"""Run on two processes: losses on heads that FSDP2 splits. Prints nothing unless something is wrong."""

import numpy as np
import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers import LlamaConfig, LlamaForCausalLM

from trainers.core import head_losses
from trainers.core.batch import Sequence, collate
from trainers.core.head_losses import Beside
from trainers.core.scoring import Scorer, hidden_states, target_logprobs
from trainers.core.sharding import Sharding
from trainers.phases.distill.train import divergence

V = 53
SIZES = {"vocab_size": V, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SEQUENCES = [Sequence(np.arange(n) * 7 % V, np.ones(n, dtype=bool)) for n in (9, 14, 6, 11)]


def model(tied: bool, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))


def logprobs(student, _, batch, sizes):
    return Scorer(student)(batch, target_logprobs(batch), lambda v, _: -v.sum())


def preferences(student, _, batch, sizes):
    def loss(values, items):
        return torch.stack([part.sum().square() for part in values.split(sizes[items])]).sum()

    return Scorer(student)(batch, target_logprobs(batch), loss, sizes)


def from_teacher(student, teacher, batch, sizes):
    with torch.no_grad():
        beside = Beside(teacher, hidden_states(teacher, batch)[batch.scored_at])
    return Scorer(student)(batch, divergence(0.5, 1.0), lambda v, _: v.sum(), beside=beside)


def backward(kind, student, teacher, sequences) -> None:
    batch = collate(sequences, True, torch.device("cpu"))
    kind(student, teacher, batch, [s.num_scored for s in sequences])[0].backward()


def main() -> None:
    mesh = init_device_mesh("cpu", (2,))
    head_losses.CHUNK_ELEMENTS = 7 * V  # several chunks, and items above one
    for tied in (False, True):
        for kind in (logprobs, preferences, from_teacher):
            whole, split = ((model(tied, 0), model(tied, 1).requires_grad_(False)) for _ in range(2))
            for half in (SEQUENCES[:2], SEQUENCES[2:]):
                backward(kind, *whole, half)
            for part in split:
                Sharding(mesh).apply(part)
            for _ in range(2):  # what is gathered in one pass is not there in the next
                split[0].zero_grad()
                backward(kind, *split, SEQUENCES[2 * mesh.get_rank() :][:2])
            for (name, ours), theirs in zip(split[0].named_parameters(), whole[0].parameters(), strict=True):
                mean = theirs.grad / 2  # FSDP2 averages over processes
                assert torch.allclose(ours.grad.full_tensor(), mean, rtol=1e-5, atol=1e-6 * mean.abs().max()), name
    torch.distributed.destroy_process_group()
