"""Compiled decoder layers: the same gradients but for rounding, and an error that says what is missing."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trainers.contract import BadInput
from trainers.core.batch import Sequence, collate
from trainers.core.compiling import compile_layers
from trainers.core.generate import generate
from trainers.core.scoring import Scorer, target_logprobs
from trainers.spec import Sampling

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("device", "variable", "said"),
    [(CPU, None, r"no g\+\+ here"), (CPU, "CXX", r"no /missing here"), (GPU, None, "no gcc or clang here")],
)
def test_a_missing_compiler_is_told_before_anything_is_computed(monkeypatch, device, variable, said):
    for name in ("CXX", "CC"):
        monkeypatch.delenv(name, raising=False)
    if variable is not None:
        monkeypatch.setenv(variable, "/missing")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(BadInput, match=rf"parallel.compile needs a compiler, and there is {said}.*compile: false"):
        compile_layers(None, device)


def tiny() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=53, **sizes)).train()


def gradient(model: LlamaForCausalLM, lengths: list[int]) -> torch.Tensor:
    sequences = [Sequence(np.arange(n) * 7 % 53, np.ones(n, dtype=bool)) for n in lengths]
    batch = collate(sequences, True, CPU)
    model.zero_grad()
    Scorer(model)(batch, target_logprobs(batch), lambda logprobs, _: -logprobs.sum())[0].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.slow
def test_programs_serve_other_lengths_and_give_the_gradients_and_sampling_does_not_use_them():
    """In training mode, with layers recomputed in the backward pass."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    eager, compiled = tiny(), tiny()
    for model in (eager, compiled):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    compile_layers(compiled, CPU)
    counters.clear()
    made = []
    for lengths in ([17, 5, 9], [40, 30, 11], [50, 33, 20]):
        expected = gradient(eager, lengths)
        worst = (gradient(compiled, lengths) - expected).abs().max()
        assert worst <= 1e-5 * expected.abs().max()
        made.append(counters["stats"]["unique_graphs"])
    assert made[0] > 0 and made[1] == made[2] and not counters["graph_break"]
    prompts, sampling = [[3, 4, 5], [6]], Sampling(max_new_tokens=5, temperature=0)
    assert generate(compiled, prompts, sampling, frozenset()) == generate(eager, prompts, sampling, frozenset())
    assert counters["stats"]["unique_graphs"] == made[2]
