"""Evaluation end to end on tiny models: figures against direct computation, and what it refuses."""

import json

import pytest
import torch
import yaml
from evaluations import BENCHMARKS, LATENCY, ROWS, copy_of, document, replies


def test_what_it_leaves(evaluated):
    root, result = evaluated
    results = document(root)
    assert results["models"] == ["a", "b"]
    assert results["baseline"] == "a"
    assert result.metrics["b/judge/winRate"] == results["values"]["b"]["judge/winRate"]["value"]
    assert "a/judge/winRate" not in result.metrics
    keys = {metric["key"]: metric for metric in results["metrics"]}
    assert keys["answers/accuracy"] == {
        "key": "answers/accuracy", "label": "right answers", "higherIsBetter": True, "headline": True, "proportion": True
    }  # fmt: skip
    assert not keys["greedy/accuracy"]["headline"]
    for found in results["values"].values():
        for cell in found.values():
            assert cell["low"] is None or cell["low"] <= cell["value"] <= cell["high"]
    assert "| b |" in (root / "summary.md").read_text()
    assert [record.source for record in result.data] == ["data.rows[0]"]


def test_responses_are_kept_for_the_report(evaluated):
    root, _ = evaluated
    rows = replies(root, "b")
    assert len(rows) == 24
    assert rows[0]["benchmarks"] == ["answers", "safety", "style", "judge", "drift", "length"]
    assert {"prompt", "response", "reward", "ended", "temperature", "shouldRefuse", "kind"} <= set(rows[0])
    assert {row["temperature"] for row in replies(root, "b", "greedy")} == {0}


def test_win_rate_is_that_of_the_kept_rewards(evaluated):
    root, result = evaluated
    pairs = [(b["reward"], a["reward"]) for a, b in zip(replies(root, "a"), replies(root, "b"), strict=True)]
    expected = sum(0.5 if ours == theirs else ours > theirs for ours, theirs in pairs) / len(pairs)
    assert result.metrics["b/judge/winRate"] == pytest.approx(expected)
    paired = document(root)["differences"]["judge/score"]["b"]["a"]
    assert paired["value"] == pytest.approx(sum(x - y for x, y in pairs) / len(pairs), abs=1e-6)


def asked(tokenizer, row):
    """The prompt's tokens, by transformers' own means."""
    turns = [{"role": "user", "content": row["prompt"]}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_perplexity_is_that_of_transformers(evaluated, other_model_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trainers.synthetic import generate

    model = AutoModelForCausalLM.from_pretrained(other_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(other_model_dir)
    nll = tokens = 0.0
    for row in generate("letters", "test", 24, 0):
        before = asked(tokenizer, row)
        after = tokenizer(row["response"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(before) + after])
        with torch.no_grad():
            nll += model(input_ids=torch.tensor([before + after]), labels=labels).loss.item() * len(after)
        tokens += len(after)
    expected = torch.tensor(nll / tokens).exp().item()
    assert evaluated[1].metrics["b/fit/perplexity"] == pytest.approx(expected, rel=1e-4)


def test_kl_is_the_sum_over_the_vocabulary(evaluated, tiny_model_dir, other_model_dir):
    """Enumerated token by token with transformers' own forward pass."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours = AutoModelForCausalLM.from_pretrained(other_model_dir)
    reference = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(other_model_dir)
    rows = replies(evaluated[0], "b")
    cells = [json.loads(path.read_text()) for path in (evaluated[0] / "cells").glob("responses-*.json")]
    texts = [row["response"] for row in rows]
    cell = next(cell for cell in cells if [reply["text"] for reply in cell["value"]] == texts)
    total = 0.0
    for row, reply in zip(rows, cell["value"], strict=True):
        assert reply["text"] == row["response"]
        before = asked(tokenizer, row)
        ids = torch.tensor([before + reply["ids"]])
        with torch.no_grad():
            p = ours(ids).logits.softmax(-1)[0]
            q = reference(ids).logits.softmax(-1)[0]
        for t in range(len(before) - 1, ids.shape[1] - 1):
            total += sum(float(a) * (float(a.log()) - float(b.log())) for a, b in zip(p[t], q[t], strict=True))
    metrics = evaluated[1].metrics
    assert metrics["b/drift/perSequence"] == pytest.approx(total / len(rows), rel=1e-3)
    assert metrics["a/drift/perSequence"] == pytest.approx(0, abs=1e-5)


def test_latency_has_every_size_and_its_percentiles(evaluated):
    root, result = evaluated
    found = document(root, "latency.json")["b"]
    assert [(p["promptLength"], p["batchSize"], p["requests"]) for p in found["points"]] == [(8, 1, 2), (8, 4, 8)]
    for point in found["points"]:
        times = point["timeToFirstToken"]
        assert 0 < times["p50"] <= times["p95"] <= times["p99"]
        assert point["tokensPerSecond"] > 0
    assert result.metrics["b/latency/parameters"] == found["parameters"] > 0


def test_other_tokens_have_no_kl_but_everything_else(spec, run_phase, tmp_path):
    from trainers.core.scratch import scratch_model
    from trainers.spec import ScratchModel

    letters = {"synthetic": {"task": "letters", "split": "test", "count": 200}}
    words = {"kind": "bytes", "vocabSize": 300, "trainOn": [letters]}
    small = {"hiddenSize": 16, "numLayers": 1, "numHeads": 2, "tokenizer": words}
    model, tokenizer = scratch_model(ScratchModel.model_validate(small), 0, tmp_path)
    model.save_pretrained(tmp_path / "bytes")
    tokenizer.save_pretrained(tmp_path / "bytes")
    models = [spec["models"][0], {"name": "c", "source": str(tmp_path / "bytes")}]
    benchmarks = [{"name": "drift", "kl": {}}, {"name": "length", "length": {}}]
    changed = {**spec, "models": models, "benchmarks": benchmarks, "latency": {"enabled": False}}
    code, result = run_phase("evaluate", changed, None, tmp_path / "run" / "eval")
    assert code == 0
    assert "c/drift/perToken" not in result.metrics
    assert "c/length/tokens" in result.metrics
    assert "not the reference's" in document(tmp_path / "run" / "eval")["notes"]["c"]["drift"]


WITHOUT = [
    ("accuracy", {}, '{"prompt": "open box : copy A"}', "no row has an answer"),
    ("safety", {}, '{"prompt": "open box : copy A", "shouldRefuse": "yes"}', "no row says shouldRefuse: true or false"),
    ("style", {"pattern": "x"}, '{"prompt": "open box : copy A", "shouldRefuse": true}', "every row is to be refused"),
    ("perplexity", {}, '{"prompt": "open box : copy A"}', "key 'response' is missing"),
    ("length", {}, '{"prompt": NaN}', "rows.jsonl:1"),
]


@pytest.mark.parametrize(("kind", "settings", "row", "says"), WITHOUT)
def test_rows_of_no_use_are_bad_input_before_a_model_is_loaded(
    spec, run_phase, tmp_path, capfd, calls, kind, settings, row, says
):
    path = tmp_path / "rows.jsonl"
    path.write_text(row + "\n")
    last = {"name": "last", kind: {**settings, "data": {"rows": [{"files": str(path)}]}}}
    changed = {**spec, "benchmarks": [*BENCHMARKS, last]}
    assert run_phase("evaluate", changed, None, tmp_path / "run" / "eval")[0] == 2
    assert says in capfd.readouterr().err
    assert calls == []


@pytest.mark.parametrize(
    ("metric", "says"),
    [("refusal", "no row says shouldRefuse: true"), ("overRefusal", None)],
)
def test_a_gate_that_no_row_can_meet_is_bad_input_before_a_model_is_loaded(
    spec, run_phase, tmp_path, capfd, calls, metric, says
):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "open box : copy A", "shouldRefuse": false}\n')
    last = {"name": "last", "safety": {"data": {"rows": [{"files": str(path)}]}}}
    gates = [{"metric": f"{spec['models'][0]['name']}/last/{metric}", "atLeast": 0}]
    changed = {**spec, "benchmarks": [last], "gates": gates, "latency": {"enabled": False}}
    code, _ = run_phase("evaluate", changed, None, tmp_path / "run" / "eval")
    assert (code, calls != []) == ((2, False) if says else (0, True))
    assert (says or "") in capfd.readouterr().err


def test_two_processes_give_the_same_figures(spec, evaluated, on_two_processes, tmp_path):
    output, file = tmp_path / "run" / "eval", tmp_path / "phase.yaml"
    file.write_text(yaml.safe_dump({"output": str(output), "spec": spec}))
    on_two_processes("evaluate", file)
    ours, theirs = document(output)["values"], document(evaluated[0])["values"]
    for model in ("a", "b"):
        for key, cell in theirs[model].items():
            defined = {part: value for part, value in cell.items() if value is not None}
            found = {part: value for part, value in ours[model][key].items() if value is not None}
            assert found == pytest.approx(defined, rel=1e-4, abs=1e-6), key


def overflowing(model_class, source, target, parameter):
    """A copy of a model whose weights are numbers, and what it computes with some of them is none."""
    import transformers

    model = getattr(transformers, model_class).from_pretrained(source)
    with torch.no_grad():
        model.get_parameter(parameter).fill_(3e38)
    model.save_pretrained(target)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(target)
    return str(target)


@pytest.mark.parametrize("benchmark", ["perplexity", "length", "accuracy", None])
def test_a_model_that_is_no_number_is_no_success(spec, run_phase, tiny_model_dir, tmp_path, capfd, benchmark):
    """Whatever is measured, the latency alone too."""
    broken = overflowing("AutoModelForCausalLM", tiny_model_dir, tmp_path / "huge", "model.norm.weight")
    benchmarks = [{"name": "only", benchmark: {}}] if benchmark else []
    latency = LATENCY if benchmark is None else {"enabled": False}
    few = {"models": [{"name": "broken", "source": broken}], "data": ROWS, "benchmarks": benchmarks, "latency": latency}
    code, result = run_phase("evaluate", few, None, tmp_path / "run" / "eval")
    assert (code, result) == (4, None)
    assert "Diverged: " in capfd.readouterr().err


def test_a_reward_model_that_is_no_number_wins_nothing(spec, run_phase, tiny_reward_dir, tmp_path, capfd):
    broken = overflowing("AutoModelForSequenceClassification", tiny_reward_dir, tmp_path / "huge", "score.weight")
    changed = {**spec, "rewardModel": {"source": broken}, "benchmarks": [{"name": "judge", "reward": {}}]}
    assert run_phase("evaluate", changed, None, tmp_path / "run" / "eval") == (4, None)
    assert "Diverged: model 'a': its rewards hold " in capfd.readouterr().err
    assert not list((tmp_path / "run" / "eval" / "cells").glob("rewards-*"))


def test_a_pattern_without_end_ends_the_phase(spec, run_phase, tmp_path, capfd):
    """Whatever the responses are: it tries every way to split one."""
    sampled = {"sampling": {"maxNewTokens": 40, "temperature": 5}}
    endless = [{"name": "style", "style": {"pattern": r"(.|.)*(?!)", **sampled}}]
    changed = {**spec, "benchmarks": endless, "latency": {"enabled": False}}
    assert run_phase("evaluate", changed, None, tmp_path / "run" / "eval") == (2, None)
    assert r"BadInput: style.pattern: '(.|.)*(?!)' takes longer than 1 s" in capfd.readouterr().err


def test_a_model_too_short_for_the_latency_has_none_but_everything_else(spec, run_phase, tmp_path):
    changed = {**spec, "benchmarks": BENCHMARKS[:1], "latency": {**LATENCY, "promptLengths": [100_000]}}
    output = tmp_path / "run" / "eval"
    code, result = run_phase("evaluate", changed, None, output)
    assert code == 0
    assert not any("/latency/" in name for name in result.metrics)
    assert "need 100004 positions" in document(output)["notes"]["a"]["latency"]
    assert "- a, latency: promptLengths and newTokens need" in (output / "summary.md").read_text()


def test_what_a_template_refuses_is_told_with_the_row(spec, run_phase, tmp_path, tiny_model_dir, capfd):
    def strict(model, tokenizer):
        refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
        tokenizer.chat_template = refusal + tokenizer.chat_template

    source = copy_of(tiny_model_dir, tmp_path / "strict", strict)
    path = tmp_path / "rows.jsonl"
    turns = [{"role": "system", "content": "copy"}, {"role": "user", "content": "copy A"}]
    path.write_text('{"prompt": "copy A"}\n' + json.dumps({"messages": turns}) + "\n")
    few = {"models": [{"name": "b", "source": source}], "data": {"rows": [{"files": str(path)}]}}
    code, _ = run_phase(
        "evaluate", {**few, "benchmarks": [{"name": "length", "length": {}}]}, None, tmp_path / "run" / "e"
    )
    assert code == 2
    error = capfd.readouterr().err
    assert f"BadInput: {path}:2: " in error and "no system turns" in error and "(model 'b')" in error


def test_a_head_wider_than_the_references_is_compared_on_what_both_know(spec, run_phase, tmp_path, tiny_model_dir):
    """Rows that only make a matrix's size a round one are sampled by nobody."""

    def wider(model, tokenizer):
        model.resize_token_embeddings(2 * model.config.vocab_size)

    source = copy_of(tiny_model_dir, tmp_path / "wide", wider)
    drift = [{"name": "drift", "kl": {}}]
    models = [spec["models"][0], {"name": "wide", "source": source}]
    hot = {"maxNewTokens": 6, "temperature": 3}
    changed = {**spec, "models": models, "sampling": hot, "benchmarks": drift, "latency": {"enabled": False}}
    code, result = run_phase("evaluate", changed, None, tmp_path / "run" / "eval")
    assert code == 0
    assert result.metrics["wide/drift/perToken"] == pytest.approx(0, abs=1e-6)


def test_a_model_without_room_for_the_responses_is_told_before_any_is_loaded(
    spec, run_phase, tmp_path, tiny_model_dir, capfd, calls
):
    def short(model, tokenizer):
        model.config.max_position_embeddings = 64

    source = copy_of(tiny_model_dir, tmp_path / "short", short)
    wordy = {"name": "wordy", "length": {"sampling": {"maxNewTokens": 64}}}
    changed = {**spec, "models": [*spec["models"], {"name": "c", "source": source}], "benchmarks": [*BENCHMARKS, wordy]}
    assert run_phase("evaluate", changed, None, tmp_path / "run" / "eval")[0] == 2
    assert "model 'c': sampling.maxNewTokens 64 leaves its 64 positions no prompt" in capfd.readouterr().err
    assert calls == []
