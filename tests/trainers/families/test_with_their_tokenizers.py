"""Families with the tokenizers and chat templates that they really have: trained, exported, and asked by plain transformers."""

import json

import pytest
import torch
from families import matrix
from families.architectures import family_model
from real_tokenizers import tokenizer as real_tokenizer

PAIRS = [
    ("llama", "llama3_1"),
    ("qwen3", "qwen3"),
    ("gemma3_text", "gemma3"),
    ("deepseek_v3", "deepseek_v3"),
    ("gpt_oss", "gptoss"),
]
ROWS = [
    {"prompt": "What is the capital of France?", "response": "Paris, of course."},
    {"prompt": "Name two colours.", "response": "Red and  green"},
    {"prompt": "Say it in Greek: hello", "response": "γεια σου 👋"},
    {"prompt": "Count to three.", "response": "1\n2\n3"},
]


SHORT = {"llama", "qwen3"}
"""What `make test` runs of these; the others have the larger vocabularies."""
CASES = [pytest.param(*pair, marks=() if pair[0] in SHORT else pytest.mark.families) for pair in PAIRS]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_what_is_learnt_by_heart_is_said_and_ended(family, name, run_phase, tmp_path):
    tokenizer = real_tokenizer(name)
    special = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id, "pad_token_id": None}
    model = family_model(family, len(tokenizer), **special)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    matrix.write(tmp_path / "rows.jsonl", ROWS)
    spec = {
        "model": {"source": str(tmp_path / "model")},
        "data": {"train": [{"files": str(tmp_path / "rows.jsonl")}], "maxLength": 128},
        "optim": {**matrix.PLAIN, "lr": 1e-2},
        "batchSize": 4,
        "duration": {"maxSteps": 40},
    }
    trained = tmp_path / "run" / "sft"
    assert run_phase("sft", spec, None, trained)[0] == 0
    exported, theirs = matrix.exported(trained)
    for row in ROWS:
        text, answer = asked(exported, theirs, row["prompt"])
        assert text.endswith(row["response"]), text
        assert answer[-1] in stops(exported) and len(answer) < 40
    # The project's own rollouts read the same text.
    rollout = {
        "policy": {"phase": "sft"},
        "data": {"prompts": [{"files": str(tmp_path / "rows.jsonl")}]},
        "sampling": {"temperature": 0, "maxNewTokens": 40},
    }
    assert run_phase("rollout", rollout, {"sft": trained}, tmp_path / "run" / "rollout")[0] == 0
    lines = (tmp_path / "run" / "rollout" / "traces.jsonl").read_text().split("\n")
    traces = [json.loads(line) for line in lines if line]
    assert [(t["teacher_response"], t["ended"]) for t in traces] == [(row["response"], True) for row in ROWS]


def asked(model, tokenizer, prompt: str) -> tuple[str, list[int]]:
    """The answer as a user of transformers gets it, without any settings but greedy."""
    messages = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        out = model.generate(**inputs, do_sample=False, max_new_tokens=40)
    answer = out[0, inputs["input_ids"].shape[1] :].tolist()
    return tokenizer.decode(answer, skip_special_tokens=True), answer


def stops(model) -> set[int]:
    found = model.generation_config.eos_token_id
    return set(found if isinstance(found, list) else [found])
