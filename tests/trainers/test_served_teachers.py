"""Several served teachers: each row is learned from its own, with its weight, and by nobody else."""

import json

import numpy as np
import pytest
import torch
from finished import lines
from served import serving
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainers.core.batch import Sequence
from trainers.core.served.server import Server
from trainers.core.served.teacher import ServedTeacher, asking
from trainers.core.served.wire import connected
from trainers.spec import Teaching
from trainers.synthetic import generate


@pytest.fixture(scope="module")
def rows():
    found = list(generate("letters", "demonstrations", 16, 0))
    return [
        {"prompt": r["prompt"], "teacher_response": r["response"], "reward": 1.0, "teacher": "ab"[i % 2]}
        for i, r in enumerate(found)
    ]


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def servers(louder):
    with serving(louder(8), name="loud") as loud, serving(louder(3), name="quiet") as quiet:
        yield loud, quiet


def spec_for(servers, student, traces, **changes):
    loud, quiet = servers
    every = len(loud.tokenizer)
    return {
        "teachers": [
            {"name": "a", "url": loud.url, "servedAs": "loud", "topK": every, "weight": 3},
            {"name": "b", "url": quiet.url, "servedAs": "quiet", "topK": every},
        ],
        "student": {"source": str(student)},
        "traces": {"files": traces},
        "weighting": {"mode": "none"},
        "onPolicyFraction": 0,
        "maxLength": 48,
        "batchSize": 16,
        "duration": {"maxSteps": 1},
    } | changes


def sequences(tokenizer, row):
    turns = [{"role": "user", "content": row["prompt"]}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    return prompt, prompt + tokenizer(row["teacher_response"])["input_ids"] + [tokenizer.eos_token_id]


def test_the_loss_by_hand(run_phase, servers, tiny_model_dir, rows, tmp_path):
    """Forward divergence of each row to its own teacher, with transformers' own forward passes."""
    spec = spec_for(servers, tiny_model_dir, written(tmp_path / "traces.jsonl", rows))
    assert run_phase("distill", spec, None, tmp_path / "run" / "distill")[0] == 0
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    student = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    above = below = 0.0
    for row in rows:
        server, weight = {"a": (servers[0], 3), "b": (servers[1], 1)}[row["teacher"]]
        prompt, whole = sequences(tokenizer, row)
        with torch.no_grad():
            log_q = student(torch.tensor([whole])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        log_p = server.log_probs(whole)[len(prompt) - 1 : -1]
        above += weight * float((log_p.exp() * (log_p - log_q)).sum())
        below += weight * (len(whole) - len(prompt))
    assert lines(tmp_path / "run" / "distill")[0]["loss"] == pytest.approx(above / below, rel=1e-4)


def test_each_is_asked_about_its_own_rows_alone(run_phase, servers, tiny_model_dir, rows, tmp_path):
    before = [len(server.asked) for server in servers]
    prompts = [{"prompt": row["prompt"], "domain": row["teacher"]} for row in rows]
    source = {"files": written(tmp_path / "prompts.jsonl", prompts), "columns": {"teacher": "domain"}}
    traces = written(tmp_path / "traces.jsonl", rows)
    spec = spec_for(servers, tiny_model_dir, traces, onPolicyFraction=0.5, duration={"maxSteps": 4}, batchSize=8)
    spec |= {"prompts": {"prompts": [source], "maxPromptLength": 32}, "sampling": {"maxNewTokens": 6}}
    assert run_phase("distill", spec, None, tmp_path / "run" / "distill")[0] == 0
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    own = {name: [sequences(tokenizer, row)[0] for row in rows if row["teacher"] == name] for name in "ab"}
    other = {name: [prompt for prompt in own["b" if name == "a" else "a"] if prompt not in own[name]] for name in "ab"}
    for name, server, first in zip("ab", servers, before, strict=True):
        asked = [b["prompt"] for b in server.asked[first:] if "prompt_logprobs" in b and len(b["prompt"]) > 2]
        assert len(asked) >= 4
        assert all(any(ids[: len(prompt)] == prompt for prompt in own[name]) for ids in asked)
        assert not any(ids[: len(prompt)] == prompt for prompt in other[name] for ids in asked)


def test_rollouts_keep_whom_a_row_is_for(run_phase, tiny_model_dir, rows, tmp_path):
    prompts = written(tmp_path / "prompts.jsonl", [{"prompt": r["prompt"], "teacher": r["teacher"]} for r in rows])
    spec = {
        "policy": {"source": str(tiny_model_dir)},
        "data": {"prompts": [{"files": prompts}]},
        "sampling": {"maxNewTokens": 4},
    }
    assert run_phase("rollout", spec, None, tmp_path / "run" / "rollout")[0] == 0
    left = [json.loads(line) for line in (tmp_path / "run" / "rollout" / "traces.jsonl").read_text().splitlines()]
    assert [row["teacher"] for row in left] == [row["teacher"] for row in rows]


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"teacher": "c"}, "the row's teacher is 'c', which is none of teachers (a, b)"),
        ({}, "the row has no teacher: it must name one of teachers (a, b)"),
    ],
)
def test_a_prompt_of_no_teacher_is_told_with_its_line_before_training(
    run_phase, servers, tiny_model_dir, rows, tmp_path, capsys, wrong, why
):
    prompts = [{"prompt": row["prompt"], "teacher": row["teacher"]} for row in rows]
    prompts[5] = {"prompt": rows[5]["prompt"], **wrong}
    source = {"files": written(tmp_path / "prompts.jsonl", prompts)}
    spec = spec_for(servers, tiny_model_dir, "", onPolicyFraction=1) | {
        "prompts": {"prompts": [source], "maxPromptLength": 32},
        "sampling": {"maxNewTokens": 6},
    }
    del spec["traces"]
    code, _ = run_phase("distill", spec, None, tmp_path / "run" / "distill")
    assert code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith("BadInput: ") and said.endswith(f"prompts.jsonl:6: {why}")
    assert not (tmp_path / "run" / "distill" / "metrics.jsonl").exists()


def test_teachers_of_one_server_share_its_bound(servers):
    """Whatever it is asked for, and whoever is asked: no more than the lowest concurrency of its teachers."""
    loud, quiet = servers
    at = [
        Teaching(url=url, served_as="any", concurrency=concurrency)
        for url, concurrency in ((loud.url, 3), (f"{loud.url}/v1/", 5), (quiet.url, 7))
    ]
    pools = asking(at)
    assert set(pools) == {loud.url, quiet.url}
    wire = connected(Server("teachers", at[0]), "loud")
    teachers = [ServedTeacher(wire, 4, loud.rows, pools[loud.url]) for _ in range(2)]
    loud.most_at_once, loud.delay = 0, 0.02
    sequences = [Sequence(np.array([5, 6, 7 + i]), np.array([False, True, True])) for i in range(9)]
    for teacher in teachers:
        teacher.ask(sequences)
    for teacher in teachers:
        assert teacher.scores(sequences, torch.device("cpu"))[0].shape == (18, 4)
    loud.delay = 0
    assert loud.most_at_once <= 3
    for pool in pools.values():
        pool.shutdown()


def test_a_name_of_no_teacher(run_phase, servers, tiny_model_dir, rows, tmp_path, capsys):
    traces = written(tmp_path / "traces.jsonl", [row | {"teacher": "c"} for row in rows])
    code, _ = run_phase("distill", spec_for(servers, tiny_model_dir, traces), None, tmp_path / "run" / "distill")
    assert code == 2
    assert "the row's teacher is 'c', which is none of teachers (a, b)" in "".join(capsys.readouterr())
