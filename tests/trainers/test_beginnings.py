"""What prompts begin with alike is read once: the plan against slots that are lists, and models against transformers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from trainers.core import beginnings, slots
from trainers.core.beginnings import levels, longest_beginning
from trainers.core.generate import generate
from trainers.core.lean import Lean
from trainers.spec import Sampling

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 7},
    "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen3": {"head_dim": 8},
}
PROMPT = st.lists(st.integers(0, 2), min_size=1, max_size=9).map(tuple)


@pytest.fixture
def eager(monkeypatch):
    """What is too little to be worth it is shared here, so that small prompts do."""
    monkeypatch.setattr(slots, "FEWEST", 2)
    monkeypatch.setattr(beginnings, "WORTH", 3)


def model(kind="llama"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **{**SIZES, **FAMILIES[kind]})).eval()


def conversations():
    """A system prompt for all, two beginnings of a conversation, one that goes on, and some alike; longer than windows."""
    random = torch.Generator().manual_seed(2)
    some = iter(torch.randint(3, 61, (400,), generator=random).tolist())

    def words(count):
        return [next(some) for _ in range(count)]

    system, one, two = words(24), words(9), words(11)
    long = system + one + words(5)
    asked = [system + words(1 + i % 4) for i in range(6)] + [system + one + words(2 + i) for i in range(4)]
    return [*asked, *[system + two + words(3) for _ in range(3)], long, long, long + words(6), words(5), words(30), [7]]


def own(model, prompt, count):
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
    return out[0, len(prompt) :].tolist()


@pytest.fixture
def tokens_read(monkeypatch):
    """Of each pass, those that are not read again to fill it up."""
    read, counts = Lean.read, []

    def counted(self, tokens, positions, grid, *rest):
        counts.append(len({(row, column) for row, column in zip(grid.row.tolist(), grid.column.tolist(), strict=True)}))
        return read(self, tokens, positions, grid, *rest)

    monkeypatch.setattr(Lean, "read", counted)
    return counts


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("size", [3, 20])
def test_greedy_answers_are_transformers_own(kind, size, eager, tokens_read):
    """Of prompts that are read at once, and of those that come in while other rows are on their way."""
    of, prompts = model(kind), conversations()
    found = generate(of, prompts, Sampling(temperature=0, max_new_tokens=8, batch_size=size), frozenset({5, 9, 17, 33}))
    for prompt, response in zip(prompts, found, strict=True):
        assert own(of, prompt, 8)[: len(response.ids)] == response.ids
        with torch.no_grad():
            logits = of(torch.tensor([prompt + response.ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        fresh = logits.log_softmax(-1)[torch.arange(len(response.ids)), response.ids]
        torch.testing.assert_close(torch.tensor(response.logprobs), fresh, atol=1e-4, rtol=0)
    assert len({len(response.ids) for response in found}) > 2
    assert sum(tokens_read) < 0.4 * sum(map(len, prompts))


def test_a_response_is_the_same_alone_and_beside_prompts_that_begin_alike(eager):
    of, prompts = model(), conversations()
    uniforms = torch.rand(len(prompts), 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for size in (4, 20):
        sampling = Sampling(max_new_tokens=8, batch_size=size)
        together = generate(of, prompts, sampling, frozenset({5, 9, 17}), uniforms=uniforms)
        for i, (prompt, response) in enumerate(zip(prompts, together, strict=True)):
            alone = generate(of, [prompt], sampling, frozenset({5, 9, 17}), uniforms=uniforms[[i]])[0]
            assert alone.ids == response.ids
            assert alone.logprobs == pytest.approx(response.logprobs, abs=1e-4)


@pytest.mark.parametrize("held", [torch.bfloat16, torch.float32], ids=["bf16", "autocast"])
def test_halves_work(held, eager):
    """Where keys are kept in another type than queries come in, too: within the rounding of eight bits."""
    of, prompts = model().to(held), conversations()
    sampling = Sampling(max_new_tokens=4, batch_size=5)
    with torch.autocast("cpu", torch.bfloat16, enabled=held == torch.float32):
        found = generate(of, prompts, sampling, frozenset(), torch.Generator().manual_seed(0))
    off = []
    for prompt, response in zip(prompts, found, strict=True):
        with torch.no_grad():
            logits = of(torch.tensor([prompt + response.ids]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        fresh = logits.double().log_softmax(-1)[torch.arange(4), response.ids]
        off.append((torch.tensor(response.logprobs) - fresh).abs())
    assert torch.cat(off).mean() < 0.05 and torch.cat(off).max() < 0.25


def test_a_system_prompt_is_read_once(tokens_read):
    """As large as they are in use: 300 tokens before 12 questions in 4 rows, one of which is asked twice."""
    random = torch.Generator().manual_seed(3)
    system = torch.randint(3, 61, (300,), generator=random).tolist()
    prompts = [system + torch.randint(3, 61, (3 + i,), generator=random).tolist() for i in range(12)]
    generate(model(), [*prompts, prompts[3]], Sampling(max_new_tokens=3, batch_size=4), frozenset(), torch.Generator())
    assert sum(tokens_read) <= 300 + sum(len(prompt) - 301 for prompt in prompts)


def test_nothing_is_shared_where_it_would_not_pay(tokens_read):
    prompts = [[1, 2, 3, 4 + i, 20 + i] for i in range(8)]
    generate(model(), prompts, Sampling(max_new_tokens=2), frozenset(), torch.Generator())
    assert tokens_read == [8 * 4], "one pass reads all of all"


def test_a_mask_that_would_be_too_large_is_not_made(monkeypatch, eager, tokens_read):
    monkeypatch.setattr(beginnings, "MOST", 40)
    of, prompts = model(), conversations()
    found = generate(of, prompts, Sampling(temperature=0, max_new_tokens=4), frozenset())
    assert [response.ids for response in found] == [own(of, prompt, 4) for prompt in prompts]
    assert sum(tokens_read) > 0.5 * sum(map(len, prompts))


@pytest.mark.parametrize("worth", [1, 4, 1000])
@settings(max_examples=150, deadline=None)
@given(there=st.lists(PROMPT, max_size=5), asked=st.sets(PROMPT, min_size=1, max_size=9))
def test_every_prompt_is_read_from_what_is_there(worth, there, asked):
    """Slots as lists: a piece begins where its slot's tokens are its own, and in the end each slot has its prompt."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(beginnings, "WORTH", worth)
        found = {prompt: longest_beginning(prompt, sorted(there)) for prompt in asked}
        for prompt, (length, like) in found.items():
            most = max((shared(prompt, other) for other in there), default=0)
            assert length == most and like[:length] == prompt[:length]
        known = {p: length if length >= 2 or length == len(p) else 0 for p, (length, _) in found.items()}
        held: dict = {p: [*p[: known[p]], *[None] * (len(p) - known[p])] for p in asked}
        count = 0
        for pieces in levels(known):
            assert len({piece.of for piece in pieces}) == len(pieces)
            for piece in pieces:
                assert tuple(held[piece.of][: piece.start]) == piece.tokens[: piece.start]
                held[piece.of][: len(piece.tokens)] = piece.tokens
                count += len(piece.tokens) - piece.start
            for piece in pieces:
                for other in piece.others:
                    held[other][: len(piece.tokens)] = piece.tokens
    assert all(tuple(tokens) == prompt for prompt, tokens in held.items())
    whole = sum(len(prompt) - known[prompt] for prompt in asked)
    assert count <= whole and (worth < 1000 or count == whole)
    if worth == 1 and not there:
        assert count == len({prompt[:end] for prompt in asked for end in range(1, len(prompt) + 1)}), "each node once"


def shared(one, other):
    count = 0
    while count < min(len(one), len(other)) and one[count] == other[count]:
        count += 1
    return count
