"""Rotary angles that transformers changes with a batch's longest row: here they are a row's own, and those of its model alone."""

import copy

import numpy as np
import pytest
import torch
from families.architectures import SIZES
from families.matrix import exported, tokens, write
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from trainers.core.batch import Sequence, collate
from trainers.core.generate import generate
from trainers.core.layers import hold_angles
from trainers.core.models import context_length
from trainers.core.scoring import Scorer, target_logprobs
from trainers.sizing.shapes import shape_of
from trainers.spec import Sampling

LONG = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0, 4.0, 8.0, 16.0]}
LIMIT = 24
CASES = {
    "llama-dynamic": (
        "llama",
        {
            "max_position_embeddings": LIMIT,
            "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
        },
    ),
    "llama-longrope": ("llama", {"rope_parameters": {**LONG, "original_max_position_embeddings": LIMIT}}),
    "phi3-longrope": ("phi3", {"rope_parameters": dict(LONG), "original_max_position_embeddings": LIMIT}),
    "olmoe-longrope": ("olmoe", {"rope_parameters": {**LONG, "original_max_position_embeddings": LIMIT}}),
}
"""The last one is sampled from by transformers' own cache."""
SMALL = {"olmoe": {"num_experts": 4, "num_experts_per_tok": 2}}


def made(kind: str, **changes):
    torch.manual_seed(0)
    special = {"vocab_size": 61, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = AutoConfig.for_model(kind, **{**SIZES, **special, **SMALL.get(kind, {}), **copy.deepcopy(changes)})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.fixture(params=CASES)
def pair(request):
    """A model as transformers reads it, and as phases do."""
    kind, changes = CASES[request.param]
    plain, held = made(kind, **changes), made(kind, **changes)
    hold_angles(held)
    return plain, held


def fresh(model, ids: list[int]) -> torch.Tensor:
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].detach()
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[1:, None])[:, 0]


def rows(*lengths: int) -> list[Sequence]:
    generator = np.random.default_rng(0)
    return [Sequence(generator.integers(3, 61, n), np.ones(n, dtype=bool)) for n in lengths]


@pytest.mark.parametrize("longest", [LIMIT - 8, LIMIT + 9], ids=["all that a phase asks for", "beyond it"])
def test_a_response_is_its_own_whatever_is_beside_it(pair, longest):
    """Up to the limit it is plain transformers' to the last token, and its log-probabilities are."""
    plain, held = pair
    sampling, stop = Sampling(temperature=1.0, max_new_tokens=8, batch_size=2), frozenset({33, 44})
    prompts = [s.ids.tolist() for s in rows(3, 1, longest, 12, 2)]
    uniforms = torch.rand(len(prompts), 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    together = generate(held, prompts, sampling, stop, uniforms=uniforms)
    for i, (prompt, response) in enumerate(zip(prompts, together, strict=True)):
        assert generate(held, [prompt], sampling, stop, uniforms=uniforms[i : i + 1])[0].ids == response.ids
        own = plain if len(prompt) + 8 <= LIMIT else held
        expected = fresh(own, prompt + response.ids)[len(prompt) - 1 :]
        torch.testing.assert_close(torch.tensor(response.logprobs), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("packing", [False, True])
def test_a_row_is_worth_the_same_beside_longer_ones(pair, packing):
    plain, held = pair
    sequences = rows(7, LIMIT, 11, LIMIT + 1, LIMIT + 12)

    def found(model) -> list[torch.Tensor]:
        batch = collate(sequences, packing, torch.device("cpu"))
        _, logprobs = Scorer(model)(batch, target_logprobs(batch), lambda logprobs, _: logprobs.sum())
        return list(logprobs.detach().split([len(s) - 1 for s in sequences]))

    short = [fresh(plain, s.ids.tolist()) for s in sequences[:3]]
    torch.testing.assert_close(found(held)[:3], short, atol=1e-4, rtol=1e-4)
    assert (found(plain)[0] - short[0]).abs().max() > 1e-2, (
        "as transformers has it, the short row hangs on the long one"
    )


def test_a_model_has_the_positions_of_which_angles_are_the_same(pair):
    plain, _ = pair
    assert context_length(plain) == LIMIT
    if plain.config.model_type != "olmoe":
        assert shape_of(plain.config.to_dict()).positions == LIMIT


def test_one_set_of_factors_has_no_limit():
    both = {**LONG, "short_factor": LONG["long_factor"], "original_max_position_embeddings": LIMIT}
    assert context_length(made("llama", rope_parameters=both)) == 128


def test_a_published_config_is_read_as_it_is():
    """Phi-3-mini-128k's: the original length is beside the factors, whose kind was `su` at first."""
    config = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    for kind in ("su", "longrope"):
        scaling = {"type": kind, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
        shape = shape_of({"model_type": "phi3", "vocab_size": 61, "rope_scaling": scaling, **sizes, **config})
        assert shape.positions == 4096


def test_the_loss_of_a_phase_is_that_of_its_rows_alone(run_phase, tiny_model_dir, tmp_path, capsys):
    """A long prompt is cut to where angles change, and that is said; the exported config is the one that came."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    special = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    model = made("phi3", vocab_size=len(tokenizer), **special, **CASES["phi3-longrope"][1])
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": "a b", "response": "A B"}, {"prompt": "c d e f " * 12, "response": "C D E F G H"}]
    write(tmp_path / "rows.jsonl", rows)
    files = [{"files": str(tmp_path / "rows.jsonl")}]
    spec = {
        "model": {"source": str(tmp_path / "model")},
        "data": {"train": files, "eval": files, "maxLength": 64},
        "batchSize": 2,
        "duration": {"maxSteps": 1},
        "parallel": {"precision": "fp32"},
    }
    output = tmp_path / "run" / "sft"
    code, result = run_phase("sft", spec, None, output)
    assert code == 0
    assert f"phi3: rotary angles change beyond {LIMIT} tokens" in capsys.readouterr().out
    after, _ = exported(output)
    assert after.config.to_dict()["rope_parameters"] == model.config.rope_parameters
    assert (after.config.max_position_embeddings, after.config.original_max_position_embeddings) == (128, LIMIT)
    answers = [[*tokenizer(row["response"])["input_ids"], tokenizer.eos_token_id] for row in rows]
    whole = [tokens(tokenizer, row["prompt"]) + answer for row, answer in zip(rows, answers, strict=True)]
    assert len(whole[0]) < LIMIT < len(whole[1])
    scored = [fresh(after, ids[-LIMIT:])[-len(answer) :] for ids, answer in zip(whole, answers, strict=True)]
    assert result.metrics["evalLoss"] == pytest.approx(-torch.cat(scored).mean().item(), rel=1e-4)
