"""Teacher rollouts as a user runs them: rows, rewards, resuming, the tokenisation check."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from trainers.phases.rollout.parts import Parts

ENCODABLE = st.characters(codec="utf-8")

PROMPTS = {"prompts": [{"synthetic": {"task": "letters", "split": "prompts", "count": 20}}], "maxPromptLength": 32}


def spec_for(policy: Path, reward: Path | None = None, **changes):
    base = {
        "policy": {"source": str(policy)},
        "data": PROMPTS,
        "sampling": {"maxNewTokens": 6, "batchSize": 4},
        "seed": 5,
    }
    if reward is not None:
        base["rewardModel"] = {"source": str(reward)}
    return base | changes


def traces(output: Path):
    return [json.loads(line) for line in (output / "traces.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def reference(run_phase, tiny_model_dir, tiny_reward_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp("rollout") / "run" / "rollout"
    code, result = run_phase("rollout", spec_for(tiny_model_dir, tiny_reward_dir, samplesPerPrompt=2), None, output)
    assert code == 0
    return output, result


def test_rows(reference):
    output, result = reference
    rows = traces(output)
    assert len(rows) == 40 == result.metrics["responses"]
    assert all(list(row) == ["prompt", "teacher_response", "reward", "ended"] for row in rows)
    assert [row["prompt"] for row in rows[::2]] == [row["prompt"] for row in rows[1::2]], "two answers to each"
    assert rows[0]["teacher_response"] != rows[1]["teacher_response"]
    assert result.steps == 10
    assert result.metrics["rewardMean"] == pytest.approx(sum(row["reward"] for row in rows) / 40)
    assert result.metrics["endedShare"] == sum(row["ended"] for row in rows) / 40
    assert not (output / "checkpoints").exists()


def test_rewards_are_the_classifiers_scores_of_prompt_and_answer(reference, tiny_reward_dir):
    tokenizer = AutoTokenizer.from_pretrained(tiny_reward_dir)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_reward_dir)
    for row in traces(reference[0])[:8]:
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True, return_dict=False
        )
        ids += tokenizer(row["teacher_response"])["input_ids"] + [tokenizer.eos_token_id] * row["ended"]
        with torch.no_grad():
            score = model(input_ids=torch.tensor([ids])).logits.item()
        assert row["reward"] == pytest.approx(score, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_the_batch_size_changes_nothing(run_phase, reference, tiny_model_dir, tiny_reward_dir, tmp_path, batch_size):
    spec = spec_for(tiny_model_dir, tiny_reward_dir, samplesPerPrompt=2)
    spec["sampling"] = {"maxNewTokens": 6, "batchSize": batch_size}
    run_phase("rollout", spec, None, tmp_path / "run" / "rollout")
    for ours, theirs in zip(traces(tmp_path / "run" / "rollout"), traces(reference[0]), strict=True):
        assert ours == theirs | {"reward": pytest.approx(theirs["reward"], abs=1e-6)}


def test_a_stopped_run_goes_on_behind_the_last_batch(
    run_phase, reference, tiny_model_dir, tiny_reward_dir, tmp_path, monkeypatch
):
    from trainers.phases.rollout.parts import Parts

    write = Parts.write
    written = []

    def stopping(self, first, last, rows):
        write(self, first, last, rows)
        written.append(first)
        if first == 12:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Parts, "write", stopping)
    spec, output = spec_for(tiny_model_dir, tiny_reward_dir, samplesPerPrompt=2), tmp_path / "run" / "rollout"
    assert run_phase("rollout", spec, None, output) == (143, None)
    assert not (output / "traces.jsonl").exists()
    code, result = run_phase("rollout", spec, None, output)
    assert code == 0
    assert written == list(range(0, 40, 4)), "no batch was made twice"
    assert (output / "traces.jsonl").read_bytes() == (reference[0] / "traces.jsonl").read_bytes()
    assert result.artifact_digest == reference[1].artifact_digest


def test_a_damaged_part_made_again_by_fewer_processes_is_not_read_twice(tmp_path):
    parts = Parts(tmp_path)
    for first in range(0, 18, 6):
        parts.write(first, first + 6, [{"n": n} for n in range(first, first + 6)])
    (tmp_path / "part-000000000-000000006.jsonl").write_bytes(b"{")
    assert parts.done() == 0
    for first in range(0, 18, 2):
        parts.write(first, first + 2, [{"n": n} for n in range(first, first + 2)])
    assert [row["n"] for row in parts.rows()] == list(range(18))


def test_a_killed_run_goes_on(reference, run_phase, tiny_model_dir, tiny_reward_dir, tmp_path):
    """kill -9 at a moment nobody chose, in a process of its own."""
    spec, output = spec_for(tiny_model_dir, tiny_reward_dir, samplesPerPrompt=2), tmp_path / "run" / "rollout"
    file = tmp_path / "phase.yaml"
    file.write_text(yaml.safe_dump({"output": str(output), "spec": spec}))
    command = [sys.executable, "-m", "trainers", "rollout", "--spec", str(file)]
    process = subprocess.Popen(command, env=os.environ | {"ALIGNMENT_METRICS_PORT": "0"}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((output / "checkpoints").glob("part-*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.wait()
    run_phase("rollout", spec, None, output)
    assert (output / "traces.jsonl").read_bytes() == (reference[0] / "traces.jsonl").read_bytes()


def test_two_processes_give_the_same_and_each_counts_its_own_half(
    reference, on_two_processes, tiny_model_dir, tiny_reward_dir, tmp_path
):
    """Dashboards add the processes' counters up."""
    output, file = tmp_path / "run" / "rollout", tmp_path / "phase.yaml"
    spec = spec_for(tiny_model_dir, tiny_reward_dir, samplesPerPrompt=2)
    file.write_text(yaml.safe_dump({"output": str(output), "spec": spec}))
    on_two_processes("rollout", file)
    for ours, theirs in zip(traces(output), traces(reference[0]), strict=True):
        assert ours == theirs | {"reward": pytest.approx(theirs["reward"], abs=1e-6)}
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["samples"] for line in lines] == [4] * 5, "of 8 in each step"


def test_conversations_keep_their_turns_and_without_a_reward_model_rewards_are_zero(
    run_phase, tiny_model_dir, tmp_path
):
    messages = [
        {"role": "system", "content": "burn box"},
        {"role": "user", "content": "A B"},
        {"role": "assistant", "content": "C"},
        {"role": "user", "content": "sort D C"},
    ]
    (tmp_path / "p.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    spec = spec_for(tiny_model_dir, data={"prompts": [{"files": "p.jsonl"}]})
    code, _ = run_phase("rollout", spec, None, tmp_path / "run" / "rollout", baseDir=str(tmp_path))
    (row,) = traces(tmp_path / "run" / "rollout")
    assert code == 0
    assert row["prompt"] == "sort D C" and row["messages"] == messages and row["reward"] == 0


def test_a_response_that_cannot_fit_is_refused(run_phase, tiny_model_dir, tmp_path, capsys):
    spec = spec_for(tiny_model_dir, sampling={"maxNewTokens": 5000})
    code, _ = run_phase("rollout", spec, None, tmp_path / "run" / "rollout")
    assert code == 2
    assert "sampling.maxNewTokens 5000" in capsys.readouterr().err


class TestTokenCheck:
    def check(self, run_phase, tmp_path, model, reward=None):
        spec = spec_for(model, reward, sampling={"maxNewTokens": 1})
        return run_phase("rollout", spec, None, tmp_path / "run" / "rollout")

    def changed(self, tiny_model_dir, tmp_path, **changes) -> Path:
        """The tiny model with another tokenizer configuration."""
        from transformers import AutoModelForCausalLM

        tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
        for name, value in changes.items():
            setattr(tokenizer, name, value)
        AutoModelForCausalLM.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "changed")
        tokenizer.save_pretrained(tmp_path / "changed")
        return tmp_path / "changed"

    def test_passes_and_counts(self, run_phase, tiny_model_dir, tiny_reward_dir, tmp_path):
        code, result = self.check(run_phase, tmp_path, tiny_model_dir, tiny_reward_dir)
        assert code == 0
        assert result.metrics["tokensMean"] == 1 and result.metrics["rewardModelSameTokens"] == 1
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
        lengths = [
            len(
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": r["prompt"]}], add_generation_prompt=True, return_dict=False
                )
            )
            for r in traces(tmp_path / "run" / "rollout")
        ]
        assert result.metrics["promptTokensMax"] == max(lengths)
        assert result.metrics["promptTokensMean"] == pytest.approx(sum(lengths) / len(lengths))

    def test_two_begin_tokens(self, run_phase, tiny_model_dir, tmp_path, capsys):
        template = AutoTokenizer.from_pretrained(tiny_model_dir).chat_template
        model = self.changed(tiny_model_dir, tmp_path, bos_token="<user>", chat_template="{{ bos_token }} " + template)
        assert self.check(run_phase, tmp_path, model)[0] == 2
        assert "two begin tokens" in capsys.readouterr().err

    def test_no_generation_prompt(self, run_phase, tiny_model_dir, tmp_path, capsys):
        template = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {{ eos_token }}{% endfor %}"
        model = self.changed(tiny_model_dir, tmp_path, chat_template=template)
        assert self.check(run_phase, tmp_path, model)[0] == 2
        assert "ends with an end token" in capsys.readouterr().err

    def test_tokens_that_change_when_read_again(self, run_phase, tiny_model_dir, tmp_path, capsys):
        """A decoder that glues words together."""
        model = self.changed(tiny_model_dir, tmp_path)
        settings = json.loads((model / "tokenizer.json").read_text())
        settings["decoder"] = {"type": "Fuse"}
        (model / "tokenizer.json").write_text(json.dumps(settings))
        assert self.check(run_phase, tmp_path, model)[0] == 2
        assert "decoded and encoded again" in capsys.readouterr().err

    def test_a_reward_model_with_other_tokens_is_reported(self, run_phase, tiny_model_dir, tiny_reward_dir, tmp_path):
        template = "{% for m in messages %}{{ m.content }} {% endfor %}"
        other = AutoTokenizer.from_pretrained(tiny_reward_dir)
        other.chat_template = template
        AutoModelForSequenceClassification.from_pretrained(tiny_reward_dir).save_pretrained(tmp_path / "rm")
        other.save_pretrained(tmp_path / "rm")
        code, result = self.check(run_phase, tmp_path, tiny_model_dir, tmp_path / "rm")
        assert code == 0 and result.metrics["rewardModelSameTokens"] == 0


def test_a_policy_that_is_no_number_is_no_success(run_phase, tiny_model_dir, tmp_path, capfd):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(3e38)  # numbers, that give none
    model.save_pretrained(tmp_path / "huge")
    AutoTokenizer.from_pretrained(tiny_model_dir).save_pretrained(tmp_path / "huge")
    output = tmp_path / "run" / "traces"
    assert run_phase("rollout", spec_for(tmp_path / "huge"), None, output) == (4, None)
    assert "Diverged: the logits" in capfd.readouterr().err
    assert not list(output.glob("checkpoints/part-*"))


@given(rows=st.lists(st.dictionaries(st.text(ENCODABLE, max_size=8), st.text(ENCODABLE)), min_size=1, max_size=6))
def test_parts_hold_any_text(rows, tmp_path_factory):
    parts = Parts(tmp_path_factory.mktemp("parts"))
    half = len(rows) // 2
    parts.write(0, half, rows[:half]) if half else None
    parts.write(half, len(rows) + 1, rows[half:])
    assert list(parts.rows()) == rows


@pytest.mark.parametrize("damage", [b"{", b"\xff\n", b'{"reward": NaN}\n', b"[" * 5000])
def test_a_damaged_part_is_made_again(damage, tmp_path):
    parts = Parts(tmp_path)
    for first in (0, 2, 4):
        parts.write(first, first + 2, [{"n": first}, {"n": first + 1}])
    (tmp_path / "part-000000002-000000004.jsonl").write_bytes(damage)
    assert parts.done() == 2
    for first in (2, 4):
        parts.write(first, first + 2, [{"n": first}, {"n": first + 1}])
    assert parts.done() == 6
    assert [row["n"] for row in parts.rows()] == [0, 1, 2, 3, 4, 5]
