"""A server that follows weights in training: what it samples is of the weights as they are, and corrected for what it is not."""

import json
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("served.py")
SERVER = {"command": [sys.executable, str(PROGRAM)]}
PROMPTS = {"prompts": [{"synthetic": {"task": "letters", "split": "prompts", "count": 16}}], "maxPromptLength": 32}


def lines(output: Path):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_a_students_greedy_samples_are_the_own_engines_at_every_step(run_phase, louder, tmp_path):
    """Large steps: with the weights of one step before, samples and losses would be others."""
    for name, served in (("own", {}), ("vllm", {"engine": "vllm"})):
        spec = {
            "teacher": {"source": str(louder(4))},
            "student": {"source": str(louder(2))},
            "prompts": PROMPTS,
            "onPolicyFraction": 1,
            "sampling": {"maxNewTokens": 8, "temperature": 0, **served},
            "maxLength": 64,
            "batchSize": 4,
            "duration": {"maxSteps": 4},
            "optim": {"lr": 0.02},
            **({"server": SERVER} if served else {}),
        }
        assert run_phase("distill", spec, None, tmp_path / name / "distill")[0] == 0
    own, theirs = (lines(tmp_path / name / "distill") for name in ("own", "vllm"))
    assert [line["loss"] for line in theirs] == pytest.approx([line["loss"] for line in own], rel=1e-4)
    assert max(line["mismatch"] for line in theirs) < 1e-6
    assert "mismatch" not in own[0]


def test_ppo_measures_how_far_the_sampler_is_from_the_policy(run_phase, louder, tiny_reward_dir, tmp_path):
    spec = {
        "policy": {"source": str(louder(4))},
        "rewardModel": {"source": str(tiny_reward_dir)},
        "data": PROMPTS,
        "iterations": 3,
        "batchSize": 8,
        "ppoEpochs": 2,
        "sampling": {"maxNewTokens": 8, "temperature": 0.7, "engine": "vllm"},
        "optim": {"lr": 0.02},
        "server": SERVER,
    }
    assert run_phase("ppo", spec, None, tmp_path / "run" / "ppo")[0] == 0
    found = lines(tmp_path / "run" / "ppo")
    assert max(line["mismatch"] for line in found) < 1e-6, "of the temperature that was sampled at"
    assert [line["importance_weight"] for line in found] == pytest.approx([1, 1, 1], abs=1e-3)
    assert max(line["approx_kl"] for line in found) > 1e-3, "which older weights would show as a mismatch"
