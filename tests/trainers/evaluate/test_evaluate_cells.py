"""Evaluations that end in the middle or begin again: nothing is measured twice, and nothing old is taken for new."""

import json
import os
import signal

import pytest
from evaluations import BENCHMARKS, copy_of, document, replies

from trainers.contract import FailureClass
from trainers.core import checked_rows
from trainers.phases.evaluate import cells


def test_what_is_not_held_in_memory_is_read_again(evaluated, spec, run_phase, tmp_path, monkeypatch):
    monkeypatch.setattr(checked_rows, "HELD_ROWS", 0)
    monkeypatch.setattr(cells, "KEPT", 1)
    root = tmp_path / "run" / "eval"
    assert run_phase("evaluate", spec, None, root)[0] == 0
    whole = document(evaluated[0])
    assert document(root)["values"] == whole["values"] and document(root)["differences"] == whole["differences"]
    for path in (evaluated[0] / "responses").iterdir():
        assert path.read_bytes() == (root / "responses" / path.name).read_bytes()


def test_equal_rows_and_sampling_are_answered_once(spec, run_phase, tmp_path, calls):
    code, _ = run_phase("evaluate", spec, None, tmp_path / "run" / "eval")
    assert code == 0
    # Two models, sampled and greedy.
    assert calls.count("respond") == 4
    assert calls.count("measure_latency") == 2
    # Each model once, and the reference.
    assert calls.count("load_causal_lm") == 3


def test_a_further_benchmark_and_a_tighter_gate_measure_nothing_again(spec, run_phase, tmp_path, calls):
    few = {**spec, "benchmarks": BENCHMARKS[:4]}
    root = tmp_path / "run" / "eval"
    assert run_phase("evaluate", few, None, root)[0] == 0
    first = document(root)["values"]["b"]
    calls.clear()

    more = {**few, "benchmarks": [*BENCHMARKS[:4], {"name": "long", "length": {}}]}
    code, result = run_phase("evaluate", more, None, root)
    assert (code, calls) == (0, [])
    assert "b/long/tokens" in result.metrics
    assert {key: document(root)["values"]["b"][key] for key in first} == first

    gate = {"metric": "b/judge/score", "atLeast": 1e6}
    code, result = run_phase("evaluate", {**more, "gates": [gate]}, None, root)
    assert (code, result, calls) == (3, result, [])
    assert result.metrics["b/judge/score"] < 1e6, "the result stands, and another gate can judge it"
    assert FailureClass.GATE_FAILED == "GateFailed"
    assert document(root)["values"]["b"] == document(root)["values"]["b"] | first
    assert (root / "summary.md").exists()
    assert (root / "latency.json").exists()


def test_another_answer_key_makes_no_model_answer_again(spec, run_phase, tmp_path, calls):
    path = tmp_path / "rows.jsonl"
    data = {"rows": [{"files": str(path)}]}
    only = {**spec, "data": data, "benchmarks": [{"name": "answers", "accuracy": {"match": "contains"}}]}
    path.write_text(json.dumps({"prompt": "paint box : copy A B", "answer": "A"}) + "\n")
    root = tmp_path / "run" / "eval"
    assert run_phase("evaluate", only, None, root)[0] == 0
    calls.clear()
    text = replies(root, "b")[0]["response"]
    path.write_text(json.dumps({"prompt": "paint box : copy A B", "answer": text or "x"}) + "\n")
    code, result = run_phase("evaluate", only, None, root)
    assert (code, calls) == (0, [])
    assert result.metrics["b/answers/accuracy"] == float(bool(text))


def test_a_killed_evaluation_goes_on(spec, evaluated, run_phase, tmp_path, calls, monkeypatch):
    from trainers.phases.evaluate import run

    root = tmp_path / "run" / "eval"
    measure = run.measure_latency

    def dies(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "measure_latency", dies)
    with pytest.raises(KeyboardInterrupt):
        run_phase("evaluate", spec, None, root)
    done = calls.copy()
    assert done.count("respond") == 2
    calls.clear()
    monkeypatch.setattr(run, "measure_latency", measure)
    assert run_phase("evaluate", spec, None, root)[0] == 0
    assert calls.count("respond") == 2
    # As if nothing had happened.
    assert document(root)["values"] == document(evaluated[0])["values"]


def test_a_damaged_cell_is_measured_again(spec, run_phase, tmp_path, calls):
    few = {**spec, "benchmarks": BENCHMARKS[:1]}
    root = tmp_path / "run" / "eval"
    assert run_phase("evaluate", few, None, root)[0] == 0
    before = document(root)["values"]
    next((root / "cells").glob("responses-*.json")).write_text("{")
    (root / "result.json").unlink()
    calls.clear()
    assert run_phase("evaluate", few, None, root)[0] == 0
    assert calls.count("respond") == 1
    assert document(root)["values"] == before


def test_between_the_responses_it_looks_for_a_request_to_stop(spec, run_phase, tmp_path, monkeypatch):
    """Responses that a pattern may take a second for, each."""
    from trainers.phases.evaluate import patterns

    looked = []

    def slow(pattern, text):
        os.kill(os.getpid(), signal.SIGTERM)
        looked.append(text)

    monkeypatch.setattr(patterns, "_search", slow)
    few = {**spec, "benchmarks": [BENCHMARKS[2]], "latency": {"enabled": False}}
    assert run_phase("evaluate", few, None, tmp_path / "run" / "eval")[0] == 143
    assert len(looked) == patterns.BETWEEN_PAUSES


def test_asked_to_stop_it_stops_at_the_next_measurement(spec, run_phase, tmp_path, monkeypatch):
    from trainers.phases.evaluate import run

    measure = run.measure_latency

    def asked(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return measure(*args)

    monkeypatch.setattr(run, "measure_latency", asked)
    root = tmp_path / "run" / "eval"
    assert run_phase("evaluate", {**spec, "benchmarks": BENCHMARKS[:1]}, None, root)[0] == 143
    # The latency that was being measured is kept.
    assert len(list((root / "cells").glob("latency-*.json"))) == 1


def test_how_a_model_is_read_is_part_of_what_was_measured(spec, run_phase, tmp_path, calls):
    few = {**spec, "benchmarks": BENCHMARKS[:1], "latency": {"enabled": False}, "models": spec["models"][:1]}
    assert run_phase("evaluate", few, None, tmp_path / "run" / "eval")[0] == 0
    assert calls.count("respond") == 1
    few["models"] = [{**few["models"][0], "dtype": "fp32"}]
    assert run_phase("evaluate", few, None, tmp_path / "run" / "eval")[0] == 0
    assert calls.count("respond") == 2


@pytest.mark.parametrize("what", ["weights", "template", "program"])
def test_what_made_a_measurement_is_part_of_it(spec, run_phase, tmp_path, tiny_model_dir, calls, monkeypatch, what):
    from transformers import AutoTokenizer

    source = copy_of(tiny_model_dir, tmp_path / "model", lambda model, tokenizer: None)
    template = tmp_path / "template.jinja"
    template.write_text(AutoTokenizer.from_pretrained(source).chat_template)
    few = {
        **spec,
        "benchmarks": BENCHMARKS[:1],
        "latency": {"enabled": False},
        "models": [{"name": "a", "source": source, "chatTemplate": str(template)}],
    }
    output = tmp_path / "run" / "eval"
    assert run_phase("evaluate", few, None, output)[0] == 0
    assert run_phase("evaluate", few, None, output)[0] == 0
    assert calls.count("respond") == 1
    if what == "template":
        template.write_text("{# edited #}" + template.read_text())
    elif what == "weights":
        copy_of(source, source, lambda model, tokenizer: model.lm_head.weight.mul_(2))
    else:
        monkeypatch.setattr("trainers.origins.program_identity", lambda module: "another")
    assert run_phase("evaluate", few, None, output)[0] == 0
    assert calls.count("respond") == 2


@pytest.mark.parametrize("benchmark", ["length", "perplexity"])
def test_shortened_prompts_are_counted_each_time(spec, run_phase, tmp_path, calls, benchmark):
    rows = [{"prompt": "open box : copy A", "response": "A"}, {"prompt": "copy", "response": "A"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"rows": [{"files": str(path)}], "maxPromptLength": 6}
    few = {**spec, "data": data, "benchmarks": [{"name": "only", benchmark: {}}], "latency": {"enabled": False}}
    output = tmp_path / "run" / "eval"
    _, first = run_phase("evaluate", few, None, output)
    assert [(record.rows, record.shortened) for record in first.data] == [(2, 1)]
    calls.clear()
    _, again = run_phase("evaluate", {**few, "data": {**data, "minRows": 0.1}}, None, output)
    assert [(record.rows, record.shortened) for record in again.data] == [(2, 1)]
    assert calls.count("respond") == 0
