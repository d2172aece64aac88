"""An evaluation of models that servers have: the figures of the own engine, from responses over the wire."""

import pytest
from evaluations import GREEDY, ROWS, document, replies
from served import serving

BENCHMARKS = [
    {"name": "answers", "accuracy": {}},
    {"name": "drift", "kl": {}},
    {"name": "fit", "perplexity": {}},
]


def test_greedy_figures_are_those_of_the_own_engine(run_phase, tiny_model_dir, other_model_dir, tmp_path):
    folders = {"a": tiny_model_dir, "b": other_model_dir}
    spec = {"baseline": "a", "data": ROWS, "benchmarks": BENCHMARKS, "latency": {"promptLengths": [8], "newTokens": 4}}
    with serving(tiny_model_dir) as one, serving(other_model_dir, name="other") as two:
        urls = {"a": one.url, "b": two.url}
        served = [{"name": name, "source": str(folder), "url": urls[name]} for name, folder in folders.items()]
        changes = {"models": served, "sampling": {**GREEDY, "engine": "vllm"}}
        code, theirs = run_phase("evaluate", spec | changes, None, tmp_path / "theirs" / "evaluate")
        assert code == 0
        asked = len(one.asked)
        assert run_phase("evaluate", spec | changes, None, tmp_path / "theirs" / "evaluate")[0] == 0
        assert len(one.asked) == asked
    changes = {"models": [{"name": name, "source": str(folder)} for name, folder in folders.items()]}
    code, ours = run_phase("evaluate", spec | changes | {"sampling": GREEDY}, None, tmp_path / "ours" / "evaluate")
    assert code == 0
    for name in folders:
        left = [replies(tmp_path / whose / "evaluate", name) for whose in ("ours", "theirs")]
        assert left[0] == left[1]
    assert theirs.metrics == pytest.approx({key: ours.metrics[key] for key in theirs.metrics})
    assert {key for key in ours.metrics if key not in theirs.metrics} == {k for k in ours.metrics if "/latency/" in k}
    assert "a server has it" in str(document(tmp_path / "theirs" / "evaluate"))


def test_models_that_are_swapped_are_noticed(run_phase, tiny_model_dir, other_model_dir, tmp_path, capsys):
    with serving(other_model_dir) as other:
        models = [{"name": "a", "source": str(tiny_model_dir), "url": other.url}]
        spec = {"models": models, "data": ROWS, "benchmarks": BENCHMARKS[:1], "latency": {"enabled": False}}
        code, _ = run_phase("evaluate", spec | {"sampling": {"engine": "vllm"}}, None, tmp_path / "run" / "evaluate")
    assert code == 2
    assert "models (a): http://127.0.0.1:" in capsys.readouterr().err
