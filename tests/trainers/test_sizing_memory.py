"""What arithmetic says that layers keep, against what torch's autograd then keeps of them."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families.architectures import FAMILIES, family_config
from live_tensors import Live
from one_rank import OneRank
from transformers import AutoModelForCausalLM

from trainers.core.batch import Sequence, collate
from trainers.core.flops import model_flops
from trainers.core.generate import generate
from trainers.core.head_losses import Beside, head_loss
from trainers.core.memory import kept_bytes, memory_needed
from trainers.core.sampling import sample
from trainers.core.scoring import Scorer, hidden_states, target_logprobs
from trainers.core.trainee import Trainee
from trainers.phases.distill.loss import PIECE_ELEMENTS, PIECES, top_k_divergence
from trainers.phases.distill.train import divergence
from trainers.sizing.families import STATE_SPACE
from trainers.sizing.memory import LOGITS, NUCLEUS, Place, Trained, activations, forward_alone, held_trained
from trainers.sizing.phases import DIVERGENCE, SCORES, STORED
from trainers.sizing.shapes import shape_of
from trainers.spec import Optim, Parallel, Sampling

TOKENS = 96
SIZES = {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 8, "num_key_value_heads": 4}
OTHERS = {
    "gpt2": {"n_embd": 128, "n_inner": 320, "n_head": 8},
    "deepseek_v3": {
        "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
        "num_key_value_heads": 8,
    },
}  # fmt: skip
WINDOWS = ("mistral", "phi3", "gemma3_text")
"""Families whose window is shorter here than the row, so that attention has a mask."""


def large_enough(family: str):
    changes = {} if family == "gpt2" else dict(SIZES)
    changes |= {
        key: value for key, value in (("head_dim", 16), ("moe_intermediate_size", 80)) if key in FAMILIES[family]
    }
    return family_config(family, 61, **(changes | OTHERS.get(family, {})))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in STATE_SPACE])
def test_what_a_token_keeps(family):
    """In fp32; no outputs of a head."""
    config = large_enough(family)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    shape = shape_of(config.to_dict())
    said = activations(Place(Parallel()), Trained(shape), TOKENS, TOKENS, masked=family in WINDOWS)
    assert said == pytest.approx(kept_bytes(OneRank(), model, TOKENS), rel=0.12)


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3_moe", "phi3", "deepseek_v3"])
def test_what_a_token_keeps_where_arithmetic_is_bf16(family, held):
    """Between layers it is of the type in which weights are held, in which embeddings give it."""
    config = large_enough(family)
    model = AutoModelForCausalLM.from_config(config, dtype=held).train()
    place, trained = Place(Parallel(), bf16=True), Trained(shape_of(config.to_dict()), held=held.itemsize)
    said = activations(place, trained, TOKENS, TOKENS, masked=family in WINDOWS)
    assert said == pytest.approx(kept_bytes(OneRank(bf16=True), model, TOKENS), rel=0.12)


@pytest.mark.parametrize("state", ["fp32", "bf16"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_held_is_what_a_phase_says_at_its_start(state, tied):
    config = family_config("llama", 61, tie_word_embeddings=tied)
    model, optim = AutoModelForCausalLM.from_config(config, dtype=torch.float32), Optim(state_dtype=state)
    one = OneRank()
    one.wrap = lambda module: module
    found = memory_needed(one, [(Trainee(one, Scorer(model), optim, 4, model_flops(model)), model)], [], 64, 64)
    said = held_trained(Place(Parallel()), Trained(shape_of(config.to_dict()), moment=2 if state == "bf16" else 4))
    assert (said.weights, said.gradients, said.optimizer) == (found.weights, found.gradients, found.optimizer)


@pytest.mark.parametrize("family", ["llama", "qwen3", "deepseek_v3", "gpt2"])
def test_what_a_token_leaves_in_the_cache(family):
    config = large_enough(family)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    caches = []
    # A model with a hook is called as it is, not stepped by the engine's own functions: either keeps the same.
    model.register_forward_hook(lambda module, args, out: caches.append(out.past_key_values))
    generate(model, [[3, 4, 5, 6]] * 2, Sampling(max_new_tokens=4, temperature=0), frozenset())
    layers = caches[-1].layers
    held = sum(t.numel() for layer in layers for t in (layer.keys, layer.values))
    assert held == shape_of(config.to_dict()).cache * 2 * 7  # the last token of eight is never read


@pytest.mark.parametrize("held", [4, 2])
def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer(held):
    shape = shape_of(large_enough("llama").to_dict())
    deep = replace(shape, layers=shape.layers * 10)
    place = Place(Parallel(gradient_checkpointing=True), bf16=held == 2)
    kept = [activations(place, Trained(each, held=held), TOKENS, TOKENS, False) for each in (deep, shape)]
    assert kept[0] - kept[1] == held * 128 * TOKENS * 18


@pytest.mark.parametrize(
    ("settings", "numbers"), [({}, LOGITS), ({"top_p": 0.9}, NUCLEUS - 6)], ids=["all", "a nucleus in a graph"]
)
def test_what_drawing_a_token_takes(settings, numbers):
    """But for what a sort takes beside its result, as nobody has measured it on a GPU."""
    logits, uniforms = torch.randn(8, 4096), torch.rand(8, dtype=torch.float64)
    with torch.no_grad(), Live() as live:
        sample(logits.clone(), Sampling(temperature=0.7, **settings), uniforms, fixed=True)
    assert live.most / (4 * logits.numel()) == pytest.approx(numbers, rel=0.1)


def test_models_whose_prompts_are_read_in_parts_are_those_that_slots_know():
    from trainers.core.slots import ALIKE, BY_KIND

    assert {family for family in FAMILIES if family not in STATE_SPACE} == ALIKE | BY_KIND


@pytest.mark.parametrize("called", [False, True], ids=["own functions", "as a model"])
def test_prompts_are_read_in_parts_of_the_size_that_is_said(called, monkeypatch):
    """Seven differing ones of 5 to 11 tokens of which the last is not read, 30 tokens or fewer at once with padding."""
    from trainers.core import slots
    from trainers.core.lean import Lean
    from trainers.sizing import memory

    monkeypatch.setattr(slots, "CELLS", 30)
    monkeypatch.setattr(memory, "CELLS", 30)
    config, read, own = large_enough("llama"), [], Lean.read
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if called:
        model.register_forward_pre_hook(
            lambda module, args, given: read.append(given["input_ids"].numel()), with_kwargs=True
        )
    monkeypatch.setattr(
        Lean,
        "read",
        lambda self, ids, at, grid, *rest: (read.append(grid.rows * grid.columns), own(self, ids, at, grid, *rest)),
    )
    prompts = [[3 + i, *range(4, 8 + i)] for i in range(7)]
    generate(model, prompts, Sampling(max_new_tokens=1, temperature=0), frozenset())
    said = memory._read_at_once(shape_of(config.to_dict()), len(prompts), 10)
    assert max(read) == said == 30


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3_moe", "phi3"])
def test_what_a_pass_without_gradients_holds(family):
    """Of all layers one after the other, and nothing of what is gone behind them."""
    config = large_enough(family)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    batch = collate([Sequence(np.arange(TOKENS) % 61, np.ones(TOKENS, dtype=bool))], False, torch.device("cpu"))
    with torch.no_grad(), Live() as live:
        hidden_states(model, batch)
    said = forward_alone(Place(Parallel()), shape_of(config.to_dict()), TOKENS, TOKENS)
    print(family, said / live.most)
    assert said == pytest.approx(live.most, rel=0.25)


POSITIONS, VOCABULARY, KEPT = 64, 4096, 32


def stored_scores():
    ids = torch.arange(KEPT).expand(POSITIONS, KEPT)
    return top_k_divergence(ids, torch.zeros(POSITIONS, KEPT + 1).log_softmax(-1), VOCABULARY, 0.5)


@pytest.mark.parametrize(
    ("compared", "with_teacher", "tensors"),
    [
        (target_logprobs(SimpleNamespace(target_ids=torch.zeros(POSITIONS, dtype=torch.long))), False, SCORES),
        (target_logprobs(SimpleNamespace(target_ids=torch.zeros(POSITIONS, dtype=torch.long)), 0.7), False, SCORES + 1),
        (divergence(0.5, 1.0), True, DIVERGENCE),
        (divergence(0.0, 1.0), True, DIVERGENCE),
        (divergence(1.0, 0.7), True, DIVERGENCE),
        (stored_scores(), False, STORED),
    ],
    ids=["log-probabilities", "and a temperature", "divergence", "forward", "reverse", "stored scores"],
)
def test_what_a_chunk_of_logits_becomes(compared, with_teacher, tensors, monkeypatch):
    """Logits, and what is made of them on the way to their gradient; each as large as they are."""
    # In a phase a processor's piece is a small part of a chunk; here as large a part as on a device.
    monkeypatch.setitem(PIECE_ELEMENTS, "cpu", POSITIONS * VOCABULARY // PIECES)
    model = AutoModelForCausalLM.from_config(
        family_config("llama", VOCABULARY, hidden_size=8, num_attention_heads=2, num_key_value_heads=2, head_dim=4)
    )
    hidden = torch.randn(POSITIONS, 8, requires_grad=True)
    beside = Beside(model, hidden.detach()) if with_teacher else None
    with Live() as live:
        head_loss(model, hidden, compared, lambda values, _: values.sum(), beside=beside)[0].backward()
    assert tensors - 0.75 < live.most / (4 * POSITIONS * VOCABULARY) < tensors + 0.75
