"""The balance loss of mixtures of experts: transformers' own for one sequence, and no matter of layout."""

import numpy as np
import pytest
import torch
from families import matrix
from families.architectures import FAMILIES, documented, family_model, sequences
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainers.core.balance import balance_losses, coefficient, collected, owners, token_counts
from trainers.core.batch import Sequence, collate
from trainers.core.scoring import Scorer, hidden_states, target_logprobs
from trainers.synthetic import generate

CPU = torch.device("cpu")
MIXTURES = [name for name, row in documented().items() if row["balance loss"] == "yes"]


def own_balance(model, sequence: Sequence) -> torch.Tensor:
    """transformers' loss of one sequence without and with the balance loss: the difference is what it adds."""
    ids = torch.from_numpy(sequence.ids)[None]
    return model(input_ids=ids, output_router_logits=True).aux_loss * model.router_aux_loss_coef


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_is_transformers_own_for_every_sequence_however_it_is_laid_out(name, checkpointing):
    model = family_model(name)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    expected = torch.stack([own_balance(model, s) for s in sequences()])
    weights = torch.linspace(0.5, 1.5, len(expected))
    gradient = _gradient(model, (expected * weights).sum())
    assert gradient.abs().max() > 0
    for packing in {False, documented()[name]["packing"] == "yes"}:
        batch = collate(sequences(), packing, CPU)
        with collected() as found:
            Scorer(model)(batch, target_logprobs(batch))
        [losses] = found
        torch.testing.assert_close(losses, expected, atol=1e-6, rtol=1e-5)
        again = _gradient(model, (losses * weights).sum())
        torch.testing.assert_close(again, gradient, atol=1e-5 * gradient.abs().max(), rtol=1e-3)


def _gradient(model, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_a_step_has_its_mean_by_tokens_whatever_is_computed_together(family_dirs, run_phase, tmp_path):
    folder, _ = family_dirs("mixtral")
    rows = list(generate("letters", "demonstrations", 8, 0))
    matrix.write(tmp_path / "rows.jsonl", rows)
    data = {"train": [{"files": str(tmp_path / "rows.jsonl")}]}
    spec = {"model": {"source": str(folder)}, "data": data, "batchSize": 8, "duration": {"maxSteps": 2}}
    lines, weights = [], []
    for tokens in (4096, 24):
        output = tmp_path / str(tokens) / "run" / "sft"
        assert run_phase("sft", {**spec, "parallel": {"microBatchTokens": tokens}}, None, output)[0] == 0
        lines.append({key: matrix.curve(output, key)[0] for key in ("loss", "balance_loss")})
        weights.append(load_file(output / "model" / "model.safetensors"))
    assert lines[1] == pytest.approx(lines[0], rel=1e-5)
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=2e-5, rtol=1e-4)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = [matrix.tokens(tokenizer, r["prompt"]) + tokenizer(r["response"] + "<eos>")["input_ids"] for r in rows]
    own = [own_balance(model, Sequence(np.array(i), np.ones(len(i), dtype=bool))).item() for i in ids]
    assert lines[0]["balance_loss"] == pytest.approx(np.average(own, weights=list(map(len, ids))), rel=1e-5)


def test_evenly_used_experts_have_the_least_loss_and_one_for_all_the_most():
    """E sum f P is top_k with equal use, and E with one expert for every token."""
    batch = collate(sequences(), False, CPU)
    positions, experts = batch.input_ids.numel(), 4
    one = torch.zeros(positions, experts).index_fill_(1, torch.tensor([2]), 50.0)
    torch.testing.assert_close(balance_losses((one, one), 1, batch), torch.full((4,), 4.0))
    torch.testing.assert_close(balance_losses((0 * one,), 4, batch), torch.full((4,), 4.0))


@pytest.mark.parametrize("packing", [False, True])
def test_positions_know_their_sequence(packing):
    lengths = [3, 9, 1, 5, 4, 9]
    marked = [Sequence(np.full(n, i + 1), np.ones(n, dtype=bool)) for i, n in enumerate(lengths)]
    batch = collate(marked, packing, CPU, pad_id=0)
    expected = torch.where(batch.input_ids.flatten() == 0, len(lengths), batch.input_ids.flatten() - 1)
    assert torch.equal(owners(batch), expected)
    assert token_counts(batch).tolist() == lengths


def test_the_families_that_ask_for_it_are_those_of_the_table():
    assert [name for name in FAMILIES if coefficient(family_model(name)) > 0] == MIXTURES


def test_nothing_is_recorded_that_is_not_trained_or_not_asked_for():
    mixture, plain = family_model("mixtral"), family_model("llama")
    batch = collate(sequences(), False, CPU)
    with collected() as found:
        with torch.no_grad():
            hidden_states(mixture, batch)
        hidden_states(plain, batch)
        mixture.config.output_router_logits = False
        hidden_states(mixture, batch)
    assert found == []
    hidden_states(mixture, batch)
    assert coefficient(mixture) == coefficient(plain) == 0.0
