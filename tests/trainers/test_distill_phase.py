"""Distillation as a user runs it: the loss by hand, resuming, splitting a step, processes, wrong pairs of models."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from finished import assert_same, lines, weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainers.phase_dir import PhaseDir

PROMPTS = {"prompts": [{"synthetic": {"task": "letters", "split": "prompts", "count": 20}}], "maxPromptLength": 32}


@pytest.fixture(scope="module")
def teacher_dir(louder) -> Path:
    return louder(8)


@pytest.fixture(scope="module")
def traces_file(tmp_path_factory) -> Path:
    from trainers.synthetic import generate

    rows = list(generate("letters", "demonstrations", 24, 0))
    path = tmp_path_factory.mktemp("traces") / "traces.jsonl"
    path.write_text(
        "".join(
            json.dumps(
                {"prompt": r["prompt"], "teacher_response": r["response"], "reward": float(i % 5), "ended": i % 3 > 0}
            )
            + "\n"
            for i, r in enumerate(rows)
        )
    )
    return path


@pytest.fixture(scope="module")
def larger_student(teacher_dir, tmp_path_factory) -> Path:
    """A student with an added token and rows for more, which it would say all the time."""
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    tokenizer.add_tokens(["surprise"])
    model = AutoModelForCausalLM.from_pretrained(teacher_dir)
    model.resize_token_embeddings(len(tokenizer) + 7, mean_resizing=False)
    with torch.no_grad():
        model.lm_head.weight[-8:] = 100 * model.lm_head.weight[:8]
    directory = tmp_path_factory.mktemp("larger")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def spec_for(teacher_dir, tiny_reward_dir, traces_file):
    def make(**changes):
        return {
            "teacher": {"source": str(teacher_dir)},
            "student": {"teacherLayers": [1]},
            "rewardModel": {"source": str(tiny_reward_dir)},
            "traces": {"files": str(traces_file)},
            "prompts": PROMPTS,
            "sampling": {"maxNewTokens": 6, "batchSize": 8},
            "divergenceBeta": 0.5,
            "maxLength": 48,
            "batchSize": 8,
            "duration": {"maxSteps": 6},
            "optim": {"lr": 1e-3},
        } | changes

    return make


@pytest.fixture(scope="module")
def reference(run_phase, spec_for, tmp_path_factory):
    output = tmp_path_factory.mktemp("distill") / "run" / "distill"
    code, result = run_phase("distill", spec_for(), None, output)
    assert code == 0
    return output, result


def test_metrics(reference):
    output, result = reference
    assert [line["on_policy"] for line in lines(output)] == [0, 1, 0, 1, 0, 1]
    assert result.metrics["parameters"] < result.metrics["teacherParameters"]
    assert all(1 <= line["ess"] <= 8 and line["kl"] > 0 for line in lines(output))
    assert all(line["ess_share"] == line["ess"] / 8 for line in lines(output))
    assert result.metrics["onPolicyKlLast"] == lines(output)[-1]["kl"]


def test_first_loss_by_hand(run_phase, spec_for, teacher_dir, traces_file, tmp_path):
    """One row at a time with transformers' own forward, TRL's divergence, and the weights written out."""
    from trl.experimental.gkd import GKDTrainer

    from trainers.core.layers import keep_layers
    from trainers.core.order import BatchOrder

    spec = spec_for(temperature=2.0, onPolicyFraction=0, duration={"maxSteps": 1}, weighting={"mode": "softmax"})
    code, _ = run_phase("distill", spec, None, tmp_path / "run" / "distill")
    assert code == 0
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_dir)
    student = keep_layers(teacher, (1,))
    rows = [json.loads(line) for line in traces_file.read_text().splitlines()]
    rows = [rows[i] for i in BatchOrder(24, 8, 1, 1, 0).indices(0)]
    above = kl = below = count = 0.0
    raw = torch.tensor([row["reward"] for row in rows]).softmax(0)
    for row, weight in zip(rows, raw.tolist(), strict=True):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, return_dict=False
        )
        answer = tokenizer(row["teacher_response"])["input_ids"] + [tokenizer.eos_token_id] * row["ended"]
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            q, p = student(ids).logits[0, len(prompt) - 1 : -1], teacher(ids).logits[0, len(prompt) - 1 : -1]
        above += weight * GKDTrainer.generalized_jsd_loss(q, p, None, 0.5, 2.0, "sum").item()
        kl += GKDTrainer.generalized_jsd_loss(q, p, None, 0, 2.0, "sum").item()
        below += weight * len(answer)
        count += len(answer)
    (line,) = lines(tmp_path / "run" / "distill")
    assert line["loss"] == pytest.approx(above / below, rel=1e-5)
    assert line["kl"] == pytest.approx(kl / count, rel=1e-5)


@pytest.mark.parametrize("stop", [1, 2, 5])
def test_a_stopped_run_continues_to_the_same_weights(run_phase, stop_after, reference, spec_for, tmp_path, stop):
    output = tmp_path / "run" / "distill"
    with stop_after(stop):
        assert run_phase("distill", spec_for(), None, output) == (143, None)
    code, result = run_phase("distill", spec_for(), None, output)
    assert code == 0
    assert_same(weights(output), weights(reference[0]))
    assert result.artifact_digest == reference[1].artifact_digest
    assert result.metrics == reference[1].metrics


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel": {"microBatchTokens": 40}},
        {"packing": False},
        {"parallel": {"gradientCheckpointing": True}},
        {"sampling": {"maxNewTokens": 6, "batchSize": 3}},
    ],
    ids=["micro-batches", "padded", "gradient-checkpointing", "smaller-rollouts"],
)
def test_how_a_step_is_computed_does_not_change_the_result(run_phase, reference, spec_for, tmp_path, changes):
    code, _ = run_phase("distill", spec_for(**changes), None, tmp_path / "run" / "distill")
    assert code == 0
    assert_same(weights(tmp_path / "run" / "distill"), weights(reference[0]), tolerance=2e-5)


@pytest.mark.parametrize("positions", [1, 7])
def test_the_size_of_logit_chunks_does_not_change_the_result(
    run_phase, reference, spec_for, tmp_path, monkeypatch, teacher_dir, positions
):
    from trainers.core import head_losses

    vocabulary = AutoModelForCausalLM.from_pretrained(teacher_dir).config.vocab_size
    monkeypatch.setattr(head_losses, "CHUNK_ELEMENTS", positions * vocabulary)
    code, _ = run_phase("distill", spec_for(), None, tmp_path / "run" / "distill")
    assert code == 0
    assert_same(weights(tmp_path / "run" / "distill"), weights(reference[0]), tolerance=2e-5)


@pytest.mark.slow
def test_two_processes_give_the_same_weights(reference, spec_for, on_two_processes, tmp_path):
    output, file = tmp_path / "run" / "distill", tmp_path / "phase.yaml"
    file.write_text(yaml.safe_dump({"output": str(output), "spec": spec_for()}))
    on_two_processes("distill", file)
    assert_same(weights(output), weights(reference[0]), tolerance=1e-5)
    assert PhaseDir(output).read_result().metrics == pytest.approx(reference[1].metrics, rel=1e-4)


@pytest.mark.parametrize(("duration", "on_policy"), [({"epochs": 1}, [0, 1, 0, 1, 0]), ({"maxSteps": 2}, [0, 1])])
def test_an_epoch_shows_every_trace_once(run_phase, spec_for, traces_file, tmp_path, duration, on_policy):
    spec = spec_for(duration=duration, maxLength=64)
    assert run_phase("distill", spec, None, tmp_path / "run" / "distill")[0] == 0
    steps = lines(tmp_path / "run" / "distill")
    assert [line["on_policy"] for line in steps] == on_policy
    if "epochs" in duration:
        rewards = [json.loads(line)["reward"] for line in traces_file.read_text().splitlines()]
        shown = [line["reward"] for line in steps if not line["on_policy"]]
        assert sum(shown) / 3 == pytest.approx(sum(rewards) / 24)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_adapters_of_the_student_are_trained_and_merged(
    run_phase, stop_after, spec_for, teacher_dir, tmp_path, precision
):
    lora = {"rank": 4, "targetModules": ["q_proj", "down_proj"]}
    spec = spec_for(lora=lora, parallel={"precision": precision}, optim={"lr": 1e-2})
    output, stopped = tmp_path / "a" / "distill", tmp_path / "b" / "distill"
    assert run_phase("distill", spec, None, output)[0] == 0
    held = torch.bfloat16 if precision == "bf16" else torch.float32  # as the base is beneath its adapters
    teacher, after = load_file(teacher_dir / "model.safetensors"), weights(output)
    before = {name: teacher[name.replace("layers.0.", "layers.1.")].to(held) for name in after}  # the student's layer
    changed = {name for name in after if not torch.equal(before[name].to(after[name]), after[name])}
    assert changed and all("q_proj" in name or "down_proj" in name for name in changed)
    with stop_after(3):
        run_phase("distill", spec, None, stopped)
    assert run_phase("distill", spec, None, stopped)[0] == 0
    assert_same(weights(stopped), after)


def test_a_student_that_is_its_teacher_has_nothing_to_learn(run_phase, spec_for, teacher_dir, tmp_path):
    spec = spec_for(student={"teacherLayers": [0, 1]}, duration={"maxSteps": 2}, optim={"lr": 1e-6})
    run_phase("distill", spec, None, tmp_path / "run" / "distill")
    assert all(line["loss"] == pytest.approx(0, abs=1e-6) for line in lines(tmp_path / "run" / "distill"))


def test_without_weighting_it_is_plain_distillation_and_needs_no_reward_model(
    run_phase, spec_for, traces_file, tmp_path
):
    spec = spec_for(weighting={"mode": "none"})
    del spec["rewardModel"]
    code, _ = run_phase("distill", spec, None, tmp_path / "run" / "none")
    assert code == 0
    equal = tmp_path / "equal.jsonl"
    rows = [json.loads(line) | {"reward": -2.5} for line in traces_file.read_text().splitlines()]
    equal.write_text("".join(json.dumps(row) + "\n" for row in rows))
    spec = spec_for(onPolicyFraction=0, traces={"files": str(equal)})
    run_phase("distill", spec, None, tmp_path / "run" / "equal")
    run_phase("distill", spec | {"weighting": {"mode": "none"}}, None, tmp_path / "run" / "plain")
    assert_same(weights(tmp_path / "run" / "equal"), weights(tmp_path / "run" / "plain"))


def test_a_student_with_a_larger_head_samples_what_its_teacher_reads(run_phase, spec_for, larger_student, tmp_path):
    changes = {"student": {"source": str(larger_student)}, "onPolicyFraction": 1.0, "duration": {"maxSteps": 2}}
    code, _ = run_phase("distill", spec_for(**changes), None, tmp_path / "run" / "distill")
    assert code == 0


def test_padding_rows_of_the_head_do_not_matter(run_phase, spec_for, teacher_dir, tmp_path):
    """The same tokenizer, but a vocabulary rounded up on one side, with loud logits in the padding."""
    spec = spec_for(student={"source": str(teacher_dir)}, duration={"maxSteps": 1}, onPolicyFraction=0)
    padded = AutoModelForCausalLM.from_pretrained(teacher_dir)
    size = padded.config.vocab_size
    padded.resize_token_embeddings(size + 16)
    with torch.no_grad():
        padded.lm_head.weight[size:] = padded.lm_head.weight[:16] * 3
    padded.save_pretrained(tmp_path / "padded")
    AutoTokenizer.from_pretrained(teacher_dir).save_pretrained(tmp_path / "padded")
    for name, changes in (
        ("teacher", {"teacher": {"source": str(tmp_path / "padded")}}),
        ("student", {"student": {"source": str(tmp_path / "padded")}}),
    ):
        code, _ = run_phase("distill", spec | changes, None, tmp_path / "run" / name)
        assert code == 0
        assert lines(tmp_path / "run" / name)[0]["loss"] == pytest.approx(0, abs=1e-6)


class TestWrongInput:
    def test_a_gate_on_a_stream_without_steps(self, run_phase, spec_for, tmp_path, capsys):
        spec = spec_for(duration={"maxSteps": 1}, gates=[{"metric": "onPolicyKlLast", "atMost": 9}])
        code, result = run_phase("distill", spec, {}, tmp_path / "run" / "distill")
        assert (code, result) == (2, None)
        assert "onPolicyKlLast cannot have a value" in capsys.readouterr().err

    def message(self, run_phase, capsys, spec, tmp_path, **file):
        code, _ = run_phase("distill", spec, None, tmp_path / "run" / "distill", **file)
        assert code == 2
        return capsys.readouterr().err

    def test_other_tokens(self, run_phase, capsys, spec_for, tmp_path):
        tokenizer = {"kind": "word", "trainOn": [{"synthetic": {"task": "letters", "split": "prompts", "count": 1}}]}
        student = {"scratch": {"hiddenSize": 16, "numLayers": 1, "tokenizer": tokenizer}}
        message = self.message(run_phase, capsys, spec_for(student=student), tmp_path)
        assert "student: its tokenizer cannot serve the teacher's" in message

    def test_a_token_that_the_teacher_does_not_know(self, run_phase, capsys, spec_for, larger_student, tmp_path):
        row = {"prompt": "say surprise", "teacher_response": "yes", "reward": 1.0}
        (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
        changes = {"student": {"source": str(larger_student)}, "traces": {"files": str(tmp_path / "t.jsonl")}}
        assert run_phase("distill", spec_for(**changes), None, tmp_path / "run" / "distill")[0] == 2
        assert "traces: the teacher does not know the token 'surprise'" in capsys.readouterr().err

    def test_a_layer_that_is_not_there(self, run_phase, capsys, spec_for, tmp_path):
        spec = spec_for(student={"teacherLayers": [0, 7]})
        assert "layers 0 to 1" in self.message(run_phase, capsys, spec, tmp_path)

    def test_a_reward_that_is_no_number(self, run_phase, capsys, spec_for, tmp_path):
        (tmp_path / "t.jsonl").write_text('{"prompt": "A", "teacher_response": "B", "reward": NaN}\n')
        spec = spec_for(traces={"files": "t.jsonl"})
        assert "NaN is no JSON" in self.message(run_phase, capsys, spec, tmp_path, baseDir=str(tmp_path))

    def test_changed_traces_are_noticed(self, run_phase, spec_for, traces_file, tmp_path):
        copy = tmp_path / "t.jsonl"
        copy.write_text(traces_file.read_text())
        spec = spec_for(traces={"files": "t.jsonl"}, duration={"maxSteps": 1})
        _, first = run_phase("distill", spec, None, tmp_path / "run" / "distill", baseDir=str(tmp_path))
        copy.write_text(traces_file.read_text().replace('"reward": 4.0', '"reward": -4.0'))
        _, second = run_phase("distill", spec, None, tmp_path / "run" / "distill", baseDir=str(tmp_path))
        assert second.digest == first.digest and second.artifact_digest != first.artifact_digest

    def test_held_out_evaluation_is_refused(self, run_phase, capsys, spec_for, tmp_path):
        spec = spec_for(evaluation={"keepBest": True})
        assert "evaluation has no effect" in self.message(run_phase, capsys, spec, tmp_path)


def test_a_trace_that_says_the_end_token_is_left_out_and_counted(run_phase, spec_for, traces_file, tmp_path):
    trace = json.loads(traces_file.read_text().splitlines()[0])
    traces = [trace, trace | {"teacher_response": "A <eos> B"}, trace]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in traces))
    spec = spec_for(traces={"files": "t.jsonl"}, duration={"maxSteps": 1})
    code, result = run_phase("distill", spec, None, tmp_path / "run" / "distill", baseDir=str(tmp_path))
    (record,) = [record for record in result.data if record.source.startswith("traces")]
    assert (code, record.rows, record.skipped) == (0, 2, 1)
    assert "'<eos>' before its end" in record.first_skipped


def test_prompts_whose_samples_may_not_fit_are_dropped_and_counted(run_phase, spec_for, tmp_path):
    """Shortened after they were sampled, samples would be trained behind another prompt than they came from."""
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": "a " * n}) + "\n" for n in (1, 2, 3, 20)))
    spec = spec_for(prompts={"prompts": [{"files": str(path)}]}, onPolicyFraction=1, maxLength=16, traces=None)
    spec["sampling"] = spec.get("sampling", {}) | {"maxNewTokens": 8}
    code, result = run_phase(
        "distill", {k: v for k, v in spec.items() if v is not None}, None, tmp_path / "run" / "distill"
    )
    assert code == 0
    assert [(record.rows, record.dropped) for record in result.data] == [(3, 1)]
