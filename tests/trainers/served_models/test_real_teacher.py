"""Distillation from a teacher that a real vLLM has: the local teacher's losses, and exactly below them with fewer tokens."""

import json

import pytest

pytestmark = pytest.mark.vllm

PROMPTS = {"prompts": [{"synthetic": {"task": "letters", "split": "prompts", "count": 20}}], "maxPromptLength": 32}


@pytest.fixture(scope="module")
def spec_for(other_dir, tmp_path_factory):
    from trainers.synthetic import generate

    rows = generate("letters", "demonstrations", 64, 0)
    found = [{"prompt": r["prompt"], "teacher_response": r["response"], "reward": 1.0} for r in rows]
    path = tmp_path_factory.mktemp("traces") / "traces.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in found))

    def make(teacher, **changes):
        return {
            "teacher": teacher,
            "student": {"source": str(other_dir)},
            "traces": {"files": str(path)},
            "prompts": PROMPTS,
            "sampling": {"maxNewTokens": 8},
            "maxLength": 64,
            "batchSize": 8,
            "duration": {"maxSteps": 6},
            "optim": {"lr": 1e-3},
        } | changes

    return make


def lines(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_its_losses_are_the_local_teachers(run_phase, vllm, spec_for, policy_dir, tmp_path, beta):
    at = {"url": vllm.url, "servedAs": "policy", "keyVariable": "VLLM_KEY"}
    teachers = {"local": {"source": str(policy_dir)}, "all": {**at, "topK": 72}, "some": {**at, "topK": 16}}
    for name, teacher in teachers.items():
        spec = spec_for(teacher, divergenceBeta=beta)
        assert run_phase("distill", spec, None, tmp_path / name / "distill")[0] == 0
    local, every, some = (lines(tmp_path / name / "distill") for name in teachers)
    assert [line["loss"] for line in every] == pytest.approx([line["loss"] for line in local], rel=1e-3, abs=1e-4)
    assert some[0]["loss"] < local[0]["loss"], "of the same student, so bounded from above"
    assert some[0]["loss"] > 0.5 * local[0]["loss"]
    assert 0.3 < some[0]["teacher_mass"] < 1
    assert [line["on_policy"] for line in some] == [0, 1, 0, 1, 0, 1]


def test_more_tokens_than_the_server_tells(run_phase, vllm, spec_for, tmp_path, capsys):
    at = {"url": vllm.url, "servedAs": "policy", "keyVariable": "VLLM_KEY", "topK": 73}
    assert run_phase("distill", spec_for(at), None, tmp_path / "run" / "distill")[0] == 2
    assert "teacher.topK 73: the teacher and the student share 72 tokens" in capsys.readouterr().err
