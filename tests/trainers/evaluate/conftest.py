"""Evaluations of two tiny models."""

import pytest
import torch
from evaluations import BENCHMARKS, LATENCY, ROWS


@pytest.fixture(scope="session")
def other_model_dir(tiny_model_dir, tmp_path_factory):
    """The tiny model with its weights moved."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    directory = tmp_path_factory.mktemp("other-model")
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def spec(tiny_model_dir, other_model_dir, tiny_reward_dir):
    return {
        "models": [{"name": "a", "source": str(tiny_model_dir)}, {"name": "b", "source": str(other_model_dir)}],
        "baseline": "a",
        "rewardModel": {"source": str(tiny_reward_dir)},
        "data": ROWS,
        "sampling": {"maxNewTokens": 6},
        "benchmarks": BENCHMARKS,
        "latency": LATENCY,
        "seed": 5,
    }


@pytest.fixture
def calls(monkeypatch):
    """Names of the expensive measurements, as they are made."""
    from trainers.phases.evaluate import bench, laboratory, run

    made = []

    def counted(module, name):
        inner = getattr(module, name)

        def call(*args, **kwargs):
            made.append(name)
            return inner(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    for name in ("respond", "response_rewards", "divergence_sums", "load_causal_lm"):
        counted(bench, name)
    counted(laboratory, "load_causal_lm")
    counted(run, "measure_latency")
    return made


@pytest.fixture(scope="module")
def evaluated(spec, run_phase, tmp_path_factory):
    root = tmp_path_factory.mktemp("evaluated") / "run" / "eval"
    code, result = run_phase("evaluate", spec, None, root)
    assert code == 0
    return root, result
