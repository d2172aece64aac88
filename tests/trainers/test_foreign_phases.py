"""Every phase that reads a reward model takes an encoder from elsewhere, and gets transformers' own scores from it."""

import json
from pathlib import Path

import pytest
import torch
from foreign_models import save_encoder
from transformers import AutoModelForSequenceClassification, AutoTokenizer

SAMPLING = {"maxNewTokens": 4, "batchSize": 8}
PROMPTS = {"synthetic": {"task": "letters", "split": "prompts", "count": 8}}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return save_encoder("deberta-v2", tmp_path_factory.mktemp("rm"))


@torch.no_grad()
def scores(folder: Path, pairs: list[tuple[str, str]]) -> list[float]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return [float(model(**tokenizer(q, a, return_tensors="pt")).logits) for q, a in pairs]


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n") if line]


@pytest.mark.parametrize("tokens", [4, 1])
def test_rollout(run_phase, tiny_model_dir: Path, encoder: Path, tmp_path: Path, tokens: int):
    """With one token it checks the tokens of both models too."""
    spec = {
        "policy": {"source": str(tiny_model_dir)},
        "rewardModel": {"source": str(encoder)},
        "data": {"prompts": [PROMPTS]},
        "sampling": {**SAMPLING, "maxNewTokens": tokens},
    }
    output = tmp_path / "run" / "rollout"
    assert run_phase("rollout", spec, None, output)[0] == 0
    traces = rows(output / "traces.jsonl")
    expected = scores(encoder, [(row["prompt"], row["teacher_response"]) for row in traces])
    assert [row["reward"] for row in traces] == pytest.approx(expected, abs=1e-4)


def test_distill(run_phase, tiny_model_dir: Path, encoder: Path, tmp_path: Path):
    spec = {
        "teacher": {"source": str(tiny_model_dir)},
        "student": {"source": str(tiny_model_dir)},
        "rewardModel": {"source": str(encoder)},
        "prompts": {"prompts": [PROMPTS]},
        "onPolicyFraction": 1.0,
        "batchSize": 8,
        "duration": {"maxSteps": 1},
        "sampling": SAMPLING,
    }
    assert run_phase("distill", spec, None, tmp_path / "run" / "distill")[0] == 0


def test_evaluate(run_phase, tiny_model_dir: Path, encoder: Path, tmp_path: Path):
    spec = {
        "models": [{"name": "tiny", "source": str(tiny_model_dir)}],
        "rewardModel": {"source": str(encoder)},
        "data": {"rows": [{"synthetic": {"task": "letters", "split": "test", "count": 6}}]},
        "sampling": SAMPLING,
        "benchmarks": [{"name": "judge", "reward": {}}],
    }
    output = tmp_path / "run" / "eval"
    code, result = run_phase("evaluate", spec, None, output)
    assert code == 0
    said = rows(output / "responses" / "tiny.jsonl")
    expected = scores(encoder, [(row["prompt"], row["response"]) for row in said])
    assert result.metrics["tiny/judge/score"] == pytest.approx(sum(expected) / len(expected), abs=1e-4)
