"""Compiled decoder layers: few programs, the same gradients but for rounding, and an error that says what is missing.

``make test`` has programs that only record and replay (torch's backend ``eager``): which ones there are does not hang on
what is made of them. ``make test-compiled`` has the real ones.
"""

import logging
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
from one_rank import OneRank
from transformers import LlamaConfig, LlamaForCausalLM

from trainers.contract import BadInput
from trainers.core.batch import Sequence, collate
from trainers.core.compiling import compile_layers
from trainers.core.generate import generate
from trainers.core.models import LoadedModel
from trainers.core.scoring import Scorer, check_scoring, target_logprobs
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


def counted() -> dict[str, Counter]:
    """torch's counters of programs, at nought. What pytest would keep of how each is made costs more than making it."""
    from torch._dynamo.utils import counters

    logging.getLogger("torch.__trace").handlers.clear()
    torch._dynamo.reset()
    counters.clear()
    return counters


@pytest.fixture
def cheaply(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setenv("CXX", "true")


def tiny(layers: int = 2) -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": layers, "num_attention_heads": 4}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=53, **sizes)).train()


def gradient(model: LlamaForCausalLM, lengths: list[int]) -> torch.Tensor:
    sequences = [Sequence(np.arange(n) * 7 % 53, np.ones(n, dtype=bool)) for n in lengths]
    batch = collate(sequences, True, CPU)
    model.zero_grad()
    Scorer(model)(batch, target_logprobs(batch), lambda logprobs, _: -logprobs.sum())[0].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_all_layers_share_programs_whatever_a_phase_does_with_them(cheaply):
    """Of a cache's entries there would be one for each layer, and torch gives up after eight."""
    programs, model = counted(), tiny(layers=10)
    compile_layers(model, CPU)
    check_scoring(LoadedModel(model, None, None), OneRank())
    made = []
    for lengths in ([17, 5, 9], [40, 20, 11], [50, 33, 20], [9], [13]):  # packed, rows of their own, one row
        gradient(model, lengths)
        made.append(programs["stats"]["unique_graphs"])
    assert made == [3, 3, 4, 5, 5], "the check has two, with a mask and without"
    assert not programs["graph_break"]


@pytest.mark.compiled
def test_programs_serve_other_lengths_and_give_the_gradients_and_sampling_does_not_use_them():
    """In training mode, with layers recomputed in the backward pass."""
    programs, eager, compiled = counted(), tiny(), tiny()
    for model in (eager, compiled):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    compile_layers(compiled, CPU)
    made = []
    for lengths in ([17, 5, 9], [40, 30, 11], [50, 33, 20]):
        expected = gradient(eager, lengths)
        worst = (gradient(compiled, lengths) - expected).abs().max()
        assert worst <= 1e-5 * expected.abs().max()
        made.append(programs["stats"]["unique_graphs"])
    assert made[0] > 0 and made[1] == made[2] and not programs["graph_break"]
    prompts, sampling = [[3, 4, 5], [6]], Sampling(max_new_tokens=5, temperature=0)
    assert generate(compiled, prompts, sampling, frozenset()) == generate(eager, prompts, sampling, frozenset())
    assert programs["stats"]["unique_graphs"] == made[2]
