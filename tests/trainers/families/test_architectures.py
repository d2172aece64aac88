"""Every architecture alone: what a token is worth does not depend on how its sequence is laid out, nor on its batch."""

import pytest
import torch
from families.architectures import FAMILIES, documented, family_model, sequences

from trainers.contract import BadInput
from trainers.core.batch import Sequence, collate
from trainers.core.generate import generate
from trainers.core.models import LoadedModel
from trainers.core.parallel import Workers
from trainers.core.scoring import Scorer, check_scoring, target_logprobs
from trainers.spec import Parallel, Sampling

CPU = torch.device("cpu")
GREEDY = Sampling(temperature=0, max_new_tokens=10, batch_size=8)
NATS = {"zamba2": 5e-3}
"""How far log-probabilities are off where a state step by step is not that of a whole sequence to the last digits."""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """Name and model; longer sequences than the sliding window has room for come from the tests."""
    return request.param, family_model(request.param).eval()


def own_logprobs(model, sequence: Sequence) -> torch.Tensor:
    ids = torch.from_numpy(sequence.ids)
    logprobs = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
    return logprobs.gather(-1, ids[1:, None]).squeeze(-1)[torch.from_numpy(sequence.scored[1:])]


def gradient(model, loss: torch.Tensor) -> torch.Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_packed_or_padded_is_alone_and_packing_is_off_where_it_is_not(family, capsys):
    name, model = family
    loaded = LoadedModel(model, tokenizer=None, chat=None)
    check_scoring(loaded, Workers(Parallel(precision="fp32")))
    assert loaded.packs == (documented()[name]["packing"] == "yes")
    assert ("packing is off" in capsys.readouterr().out) != loaded.packs
    alone = torch.cat([own_logprobs(model, s) for s in sequences()])
    expected = gradient(model, alone.sum())
    for packing in {False, loaded.packs}:
        batch = collate(sequences(), packing, CPU)
        loss, found = Scorer(model)(batch, target_logprobs(batch), lambda logprobs, _: logprobs.sum())
        torch.testing.assert_close(found, alone, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(gradient(model, loss), expected, atol=2e-4 * expected.abs().max(), rtol=1e-3)


def test_answers_side_by_side_are_transformers_own_alone(family):
    """Prompts of all lengths, padded on the left, of which some end early and leave the cache; log-probabilities too."""
    name, model = family
    prompts = [s.ids.tolist() for s in sequences()]
    whole = [own_answer(model, prompt, frozenset()) for prompt in prompts]
    stop = frozenset({whole[0][2], whole[1][1]})
    for stops in (frozenset(), stop):
        found = generate(model, prompts, GREEDY, stops)
        assert [r.ids for r in found] == [own_answer(model, prompt, stops) for prompt in prompts]
        for prompt, response in zip(prompts, found, strict=True):
            logits = model(input_ids=torch.tensor([prompt + response.ids])).logits[0, len(prompt) - 1 : -1]
            fresh = logits.detach().log_softmax(-1).gather(-1, torch.tensor(response.ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(response.logprobs), fresh, atol=NATS.get(name, 1e-4), rtol=0)


def own_answer(model, prompt: list[int], stop: frozenset[int]) -> list[int]:
    ids = torch.tensor([prompt])
    settings = {"do_sample": False, "max_new_tokens": 10, "pad_token_id": 0, "eos_token_id": sorted(stop) or None}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(prompt) :].tolist()


def test_a_model_without_a_cache_cannot_generate(monkeypatch):
    model = family_model("lfm2").eval()
    forward = model.forward

    def without_cache(*args, **kwargs):
        out = forward(*args, **kwargs)
        out.past_key_values = None
        return out

    monkeypatch.setattr(model, "forward", without_cache)
    with pytest.raises(BadInput, match="lfm2 cannot generate"):
        generate(model, [[5, 6]], GREEDY, frozenset())
