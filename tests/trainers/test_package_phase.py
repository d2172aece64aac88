"""Packaging of a whole little run: what is exported, what is said about it, and what is left out when it is not there."""

import json
import os
import re
import shutil

import pytest
import torch

from trainers.phases.package.effects import Change
from trainers.phases.package.plots import CURVES, draw_curve
from trainers.phases.package.samples import chosen, side_by_side


def source(split, count=16):
    return {"synthetic": {"task": "letters", "split": split, "count": count}}


SHORT = {"duration": {"maxSteps": 3}, "batchSize": 8}
ATTACK = "<script>document.title='owned'</script><img src=x onerror=alert(1)>|`</pre>"


@pytest.fixture(scope="session")
def little_run(tiny_model_dir, run_phase, tmp_path_factory):
    """sft, reward, dpo and an evaluation in which a response is an attack."""
    root = tmp_path_factory.mktemp("little") / "run"
    phases = {}

    def phase(name, kind, spec, inputs=()):
        code, _ = run_phase(kind, spec, {i: phases[i] for i in inputs}, root / name, run="little", phase=name)
        assert code == 0, name
        phases[name] = root / name

    base = {"source": str(tiny_model_dir)}
    held_out = {"train": [source("demonstrations")], "eval": [source("demonstrations", 4)], "maxLength": 32}
    pairs = {"train": [source("preferences")], "maxLength": 32}
    phase("sft", "sft", {"model": base, "data": held_out, **SHORT})
    phase("reward", "reward", {"model": base, "data": pairs, **SHORT})
    phase("dpo", "dpo", {"policy": {"phase": "sft"}, "data": pairs, **SHORT}, ["sft"])
    evaluate = {
        "models": [{"name": "base", **base}, {"phase": "sft"}, {"phase": "dpo"}],
        "baseline": "sft",
        "rewardModel": {"phase": "reward"},
        "data": {"rows": [source("test", 20)]},
        "sampling": {"maxNewTokens": 6},
        "benchmarks": [
            {"name": "answers", "accuracy": {}},
            {"name": "safety", "safety": {}},
            {"name": "judge", "reward": {}},
            {"name": "drift", "kl": {}},
        ],
        "latency": {"promptLengths": [8], "newTokens": 4, "batchSizes": [1], "repeats": 1},
    }
    phase("eval", "evaluate", evaluate, ["sft", "reward", "dpo"])
    path = root / "eval" / "responses" / "dpo.jsonl"
    rows = [json.loads(line) | {"response": ATTACK} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return phases


@pytest.fixture(scope="session")
def packaged(little_run, run_phase, tmp_path_factory):
    root = tmp_path_factory.mktemp("packaged") / "run" / "package"
    code, result = run_phase("package", {"title": "A & B"}, little_run, root, run="little")
    assert code == 0
    return root, result


def test_models_load_and_are_the_phases_own(packaged, little_run):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    root, result = packaged
    assert sorted(path.name for path in (root / "models").iterdir()) == ["dpo", "reward", "sft"]
    assert result.metrics["models"] == 3
    ids = torch.arange(5)[None]
    for name, auto in (("dpo", AutoModelForCausalLM), ("reward", AutoModelForSequenceClassification)):
        exported = auto.from_pretrained(root / "models" / name)
        original = auto.from_pretrained(little_run[name] / "model")
        assert torch.equal(exported(ids).logits, original(ids).logits)
        assert AutoTokenizer.from_pretrained(root / "models" / name).eos_token


def test_an_edited_copy_leaves_the_phase_alone(packaged, little_run):
    exported, original = packaged[0] / "models" / "sft", little_run["sft"] / "model"
    assert os.path.samefile(exported / "model.safetensors", original / "model.safetensors")
    assert not os.path.samefile(exported / "config.json", original / "config.json")
    assert not (original / "README.md").exists()


def test_the_card_says_where_it_comes_from(packaged, little_run):
    card = (packaged[0] / "models" / "dpo" / "README.md").read_text()
    result = json.loads((little_run["dpo"] / "result.json").read_text())
    for fact in (
        "| dpo | dpo | `" + result["artifactDigest"][:16],
        "policy: sft",
        "synthetic letters/preferences, seed 0 | 16 |",
        result["data"][0]["fingerprint"][:16],
        "| beta | 0.1 |",
        "| judge: wins vs sft |",
        "torch " + result["versions"]["torch"],
        "AutoModelForCausalLM",
    ):
        assert fact in card
    assert "AutoModelForSequenceClassification" in (packaged[0] / "models" / "reward" / "README.md").read_text()


def test_the_cards_own_code_gives_the_score_that_was_trained(packaged, little_run, monkeypatch):
    """Its two blocks, run as a reader would, against the phase's own way of scoring."""
    from test_reward_phase import our_scores

    card = (packaged[0] / "models" / "reward" / "README.md").read_text()
    assert "that ends the response: `<eos>`" in card
    code = "\n".join(re.findall(r"```python\n(.*?)```", card, re.S))
    row = {"prompt": "open hat", "chosen": "A B", "rejected": "B"}
    for text in (row["prompt"], row["chosen"]):
        code = code.replace("…", text, 1)
    monkeypatch.chdir(packaged[0])
    found: dict = {}
    exec(code, found)
    expected = our_scores(little_run["reward"] / "model", [row])[0, 0]
    assert float(found["score"].detach()) == pytest.approx(float(expected), abs=1e-5)


def test_every_figure_is_in_one_file(packaged, little_run):
    found = json.loads((packaged[0] / "metrics.json").read_text())
    assert set(found["phases"]) == set(little_run)
    assert found["evaluations"]["eval"] == json.loads((little_run["eval"] / "results.json").read_text())
    steps = {step["model"]: step["effects"] for step in found["steps"]["eval"]}
    assert steps["sft"] == []
    (effect,) = steps["dpo"]
    assert (effect["other"], effect["relation"]) == ("sft", "its start")
    assert effect["changes"]["judge/score"]["low"] <= effect["changes"]["judge/score"]["value"]


def test_samples_stand_side_by_side(packaged):
    entries = [json.loads(line) for line in (packaged[0] / "samples.jsonl").read_text().splitlines()]
    assert len(entries) == 12
    assert {entry["shouldRefuse"] for entry in entries} == {True, False}
    assert all(set(entry["responses"]) == {"base", "sft", "dpo"} for entry in entries)
    assert f"    {ATTACK}" in (packaged[0] / "samples.md").read_text()


def test_the_report_escapes_what_models_say(packaged):
    text = (packaged[0] / "report.html").read_text()
    assert "<script" not in text
    assert "<img" not in text
    assert "&lt;script&gt;" in text
    assert "<title>A &amp; B</title>" in text


def test_plots_of_every_phase(packaged):
    names = {path.stem for path in (packaged[0] / "plots").iterdir()}
    assert {"sft-loss", "reward-accuracy", "dpo-margin", "eval-answers-accuracy"} <= names
    assert "nats per token" in (packaged[0] / "plots" / "sft-loss.svg").read_text()


def test_the_same_run_gives_the_same_report(packaged, little_run, run_phase, tmp_path):
    root = tmp_path / "run" / "package"
    assert run_phase("package", {"title": "A & B"}, little_run, root, run="little")[0] == 0
    assert (root / "report.html").read_text() == (packaged[0] / "report.html").read_text()


def test_without_an_evaluation_it_says_so(little_run, run_phase, tmp_path):
    root = tmp_path / "run" / "package"
    code, result = run_phase("package", {}, {"sft": little_run["sft"]}, root, run="little")
    assert code == 0
    assert result.metrics["models"] == 1
    text = (root / "report.html").read_text()
    assert "No evaluation" in text
    assert 'href="#samples"' not in text
    assert (root / "samples.jsonl").read_text() == ""


def test_a_phase_that_leaves_no_model_cannot_be_exported(little_run, run_phase, tmp_path, capfd):
    spec = {"models": [{"phase": "eval"}]}
    assert run_phase("package", spec, little_run, tmp_path / "run" / "package")[0] == 2
    assert "phase 'eval' leaves no model" in capfd.readouterr().err


# ---------------------------------------------------------------- parts


@pytest.mark.parametrize(
    ("low", "high", "better", "verdict"),
    [
        (0.1, 0.3, True, "better"),
        (0.1, 0.3, False, "worse"),
        (-0.3, -0.1, True, "worse"),
        (-0.3, -0.1, False, "better"),
        (-0.1, 0.3, True, "unclear"),
        (0.0, 0.0, True, "unclear"),
    ],
)
def test_a_change_is_clear_only_if_its_interval_leaves_out_zero(low, high, better, verdict):
    assert Change("k", "k", 0, 0, (low + high) / 2, low, high, better).verdict == verdict


def test_kinds_take_turns():
    rows = [{"kind": kind} for kind in "aaaabac"]
    assert chosen(rows, 3) == [0, 4, 6]
    assert chosen(rows, 5) == [0, 1, 2, 4, 6]
    assert chosen([{}, {}], 9) == [0, 1]


def test_models_that_answered_other_prompts_are_left_out():
    class Evaluation:
        responses = {
            "a": [{"prompt": "x", "response": "1", "benchmarks": ["b"]}],
            "b": [{"prompt": "y", "response": "2", "benchmarks": ["b"]}],
            "c": [],
        }

    assert [set(entry["responses"]) for entry in side_by_side(Evaluation(), 4)] == [{"a"}]


def test_a_long_curve_stays_small():
    import numpy as np

    steps = np.arange(100_000.0)
    svg = draw_curve("p-loss", CURVES[0], {"training": (steps, np.sin(steps))})
    assert len(svg) < 40_000
    assert "var(--first, #1f6fb2)" in svg
    assert 'id="p-loss-' in svg


@pytest.mark.parametrize(("name", "number"), [("results.json", "NaN"), ("latency.json", "1e999")])
def test_figures_that_are_no_numbers_are_not_packaged(little_run, run_phase, tmp_path, capfd, name, number):
    """Neither as a dash, nor as the best of their column."""
    copy = shutil.copytree(little_run["eval"], tmp_path / "run" / "eval")
    text = (copy / name).read_text()
    found = re.sub(r'("value"|"tokensPerSecond"): [\d.]+', rf"\1: {number}", text, count=1)
    assert found != text
    (copy / name).write_text(found)
    output = tmp_path / "run" / "package"
    assert run_phase("package", {}, {**little_run, "eval": copy}, output, run="little") == (2, None)
    assert f"{copy / name}: " in capfd.readouterr().err
