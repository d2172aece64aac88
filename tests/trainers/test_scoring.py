"""Scores of chosen positions: independence of chunks, empty batches, and models that cannot be packed."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaForCausalLM

from trainers.contract import BadInput
from trainers.core import head_losses
from trainers.core.batch import Sequence, collate
from trainers.core.models import LoadedModel
from trainers.core.parallel import Workers
from trainers.core.rewards import check_reward_scoring, reward_scores
from trainers.core.scoring import Scorer, check_scoring, error_share, head_logits, target_logprobs
from trainers.spec import Parallel

CPU = torch.device("cpu")
VOCABULARY = 53
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny(kind: str = "llama", auto=AutoModelForCausalLM, **changes):
    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(kind, **{**SIZES, **changes})).eval()
    for parameter in model.parameters():
        parameter.data *= 4
    return model


def packs(model, check=check_scoring) -> bool:
    """What the start-up check finds out of a model."""
    loaded = LoadedModel(model, tokenizer=None, chat=None)
    check(loaded, Workers(Parallel(precision="fp32")))
    return loaded.packs


def sequences(lengths: list[int]) -> list[Sequence]:
    generator = np.random.default_rng(0)
    made = []
    for n in lengths:
        scored = np.ones(n, dtype=bool)
        scored[: n // 3] = False
        made.append(Sequence(generator.integers(1, VOCABULARY, n), scored))
    return made


def without_positions(forward):
    def ignoring(*args, **kwargs):
        kwargs.pop("position_ids", None)
        return forward(*args, **kwargs)

    return ignoring


def value_and_gradient(model) -> tuple[torch.Tensor, torch.Tensor]:
    batch = collate(sequences([9, 4, 6, 2]), True, CPU)
    model.zero_grad()
    weights = torch.linspace(0.5, 1.5, len(batch.scored_at))
    fn = target_logprobs(batch, temperature=0.7)
    loss, logprobs = Scorer(model)(batch, fn, lambda found, at: (found * weights[at]).sum())
    loss.backward()
    return logprobs, torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
@pytest.mark.parametrize("rows", [1, 3, 7])
def test_chunks_change_neither_value_nor_gradient(monkeypatch, kind, rows):
    model = tiny(kind, **({"final_logit_softcapping": 2.0, "head_dim": 8} if kind == "gemma2" else {}))
    whole_value, whole_gradient = value_and_gradient(model)
    monkeypatch.setattr(head_losses, "CHUNK_ELEMENTS", rows * VOCABULARY)
    value, gradient = value_and_gradient(model)
    torch.testing.assert_close(value, whole_value, atol=1e-6, rtol=1e-6)
    scale = whole_gradient.abs().max()
    torch.testing.assert_close(gradient / scale, whole_gradient / scale, atol=1e-6, rtol=0)


def test_a_chunk_never_holds_more_logits_than_allowed(monkeypatch):
    monkeypatch.setattr(head_losses, "CHUNK_ELEMENTS", 4 * VOCABULARY)
    seen = []
    batch = collate(sequences([9, 9]), True, CPU)

    def look(logits: torch.Tensor, where: slice) -> torch.Tensor:
        seen.append(logits.shape)
        return logits[:, 0]

    Scorer(tiny())(batch, look)
    assert {shape[1] for shape in seen} == {VOCABULARY}
    assert max(shape[0] for shape in seen) == 4


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("gemma2", {"final_logit_softcapping": 2.0, "head_dim": 8}),
        ("cohere", {"logit_scale": 0.5}),
        ("granite", {"logits_scaling": 3.0}),
    ],
)
def test_logprobs_are_the_models_own(kind, changes):
    model = tiny(kind, **changes)
    some = sequences([9, 4, 6])
    batch = collate(some, True, CPU)
    found = Scorer(model)(batch, target_logprobs(batch))
    expected = []
    for s in some:
        ids = torch.from_numpy(s.ids)
        own = model(input_ids=ids[None]).logits[0, :-1].float().log_softmax(-1)
        expected.append(own.gather(-1, ids[1:, None]).squeeze(-1)[torch.from_numpy(s.scored[1:])])
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-5, rtol=1e-5)
    assert packs(model)


def test_nothing_to_score_is_a_finite_zero_with_a_backward_pass():
    model = tiny()
    hidden = [Sequence(s.ids, np.zeros_like(s.scored)) for s in sequences([5, 3])]
    for batch in (collate([], True, CPU), collate(hidden, True, CPU)):
        loss, _ = Scorer(model)(batch, target_logprobs(batch), lambda found, _: found.sum())
        assert loss.item() == 0.0
        loss.backward()
        gradients = [p.grad for p in model.parameters()]
        assert all(g is not None and torch.count_nonzero(g) == 0 for g in gradients), "every rank must join in"
        model.zero_grad()


def test_packing_is_off_where_positions_are_ignored(monkeypatch, capsys):
    """As models with convolutions or linear attention do: packed sequences would see each other."""
    model = tiny()
    monkeypatch.setattr(model.model, "forward", without_positions(model.model.forward))
    assert not packs(model)
    assert capsys.readouterr().out.count("packing is off: models of type llama") == 1


def test_a_model_that_sees_what_comes_later_is_refused(monkeypatch):
    """Padding changes what such a model says of the tokens before."""
    model = tiny()
    forward = model.model.forward

    def seeing_all(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.last_hidden_state = out.last_hidden_state + out.last_hidden_state.mean(1, keepdim=True)
        return out

    monkeypatch.setattr(model.model, "forward", seeing_all)
    with pytest.raises(BadInput, match="llama cannot be used: padded"):
        packs(model)


def test_one_token_sent_to_another_expert_is_no_leak():
    own = [torch.ones(5, 3), torch.ones(4, 3)]
    flipped = [o.clone() for o in own]
    flipped[0][2] += 1.0
    assert error_share(flipped, own) == 0.0
    assert error_share([own[0], own[1] * 1.5], own) == 0.5


def test_check_scoring_refuses_a_head_that_does_more_than_ours():
    class Louder(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * 1.1
            return out

    with pytest.raises(BadInput, match="differ from the model's own"):
        packs(Louder(tiny().config))


def test_check_scoring_leaves_the_mode_alone():
    model = tiny()
    for training in (True, False):
        model.train(training)
        packs(model)
        assert model.training is training


# ---------------------------------------------------------------- reward models


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2"])
def test_a_score_depends_on_nothing_but_its_sequence(kind):
    changes = {"head_dim": 8} if kind != "llama" else {}
    model = tiny(kind, AutoModelForSequenceClassification, num_labels=1, **changes)
    some = sequences([9, 4, 6, 2])
    alone = torch.cat([model(input_ids=torch.from_numpy(s.ids[None])).logits[0] for s in some])
    for packing in (True, False):
        torch.testing.assert_close(reward_scores(model, collate(some, packing, CPU)), alone, atol=1e-5, rtol=1e-5)
        turned = reward_scores(model, collate(some[::-1], packing, CPU)).flip(0)
        torch.testing.assert_close(turned, alone, atol=1e-5, rtol=1e-5)
    assert packs(model, check_reward_scoring)


def test_packing_is_off_for_a_reward_model_that_ignores_positions(monkeypatch):
    model = tiny("llama", AutoModelForSequenceClassification, num_labels=1)
    monkeypatch.setattr(model.model, "forward", without_positions(model.model.forward))
    assert not packs(model, check_reward_scoring)


def test_head_logits_are_fp32_whatever_the_model_is():
    model = tiny().to(torch.bfloat16)
    assert head_logits(model, torch.zeros(2, 32, dtype=torch.bfloat16)).dtype == torch.float32


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_logprobs_are_fp32_from_the_last_hidden_state_on(held):
    model = tiny().to(held)
    batch = collate(sequences([9, 4, 6]), True, CPU)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = Scorer(model)(batch, target_logprobs(batch))
        hidden = model.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)[0]
    at = hidden.flatten(0, 1)[batch.scored_at].float()
    logprobs = (at @ model.lm_head.weight.detach().float().T).log_softmax(-1)
    torch.testing.assert_close(found, logprobs.gather(-1, batch.target_ids[:, None]).squeeze(-1))


def test_chunks_of_a_bf16_head_add_their_gradients_up_in_fp32(monkeypatch):
    """Added up in bf16, many small chunks lose what is smaller than a 256th of the sum."""
    model = tiny().to(torch.bfloat16)
    batch = collate(sequences([200]), True, CPU)

    def gradient() -> torch.Tensor:
        model.zero_grad()
        Scorer(model)(batch, target_logprobs(batch), lambda found, _: found.sum())[0].backward()
        return model.lm_head.weight.grad.float()

    whole = gradient()
    monkeypatch.setattr(head_losses, "CHUNK_ELEMENTS", VOCABULARY)
    difference = (gradient() - whole).abs()
    assert (difference <= whole.abs() * 2**-7 + 1e-6 * whole.abs().max()).all(), "more than the last rounding"


def test_different_sequences_get_different_scores_in_bf16():
    model = tiny("llama", AutoModelForSequenceClassification, num_labels=1).to(torch.bfloat16)
    some = sequences([12] * 300)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scores = reward_scores(model, collate(some, False, CPU))
    assert scores.dtype == torch.float32
    assert len(scores.unique()) == 300
