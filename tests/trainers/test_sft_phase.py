"""Supervised fine-tuning as a user runs it, and what every phase inherits from the shared loop parts."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import torch
import yaml
from finished import assert_same, lines, weights
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trainers.meter import Meter
from trainers.phase_dir import PhaseDir

DEMONSTRATIONS = {"synthetic": {"task": "letters", "split": "demonstrations", "count": 48}}


def spec_for(model: Path, **changes):
    base = {
        "model": {"source": str(model)},
        "data": {"train": [DEMONSTRATIONS], "maxLength": 64},
        "batchSize": 16,
        "duration": {"maxSteps": 6},
        "optim": {"lr": 1e-3},
    }
    return {**base, **changes}


@pytest.fixture(scope="module")
def reference(run_phase, tiny_model_dir, tmp_path_factory):
    """One undisturbed run, to compare others with."""
    output = tmp_path_factory.mktemp("reference") / "run" / "sft"
    code, result = run_phase("sft", spec_for(tiny_model_dir), None, output)
    assert code == 0
    return output, result


def test_training_lowers_the_loss_and_leaves_a_loadable_model(reference):
    output, result = reference
    steps = lines(output)
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[-1]["loss"] < steps[0]["loss"] - 0.15
    model = AutoModelForCausalLM.from_pretrained(output / "model")
    assert sum(p.numel() for p in model.parameters()) == result.metrics["parameters"]
    assert AutoTokenizer.from_pretrained(output / "model").chat_template
    assert [path.name for path in (output / "checkpoints").iterdir()] == ["step-6"]


def test_a_phase_takes_its_page_down(run_phase, tiny_model_dir, tmp_path, monkeypatch):
    """Hundreds of phases in one process left so many servers that each looked up twice a second."""
    ports: list[int] = []
    began = Meter.begin

    def begin(self, *arguments):
        assert urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics").status == 200
        ports.append(self.port)
        began(self, *arguments)

    monkeypatch.setattr(Meter, "begin", begin)
    assert run_phase("sft", spec_for(tiny_model_dir, duration={"maxSteps": 1}), None, tmp_path / "run" / "sft")[0] == 0
    deadline = time.monotonic() + 60
    while _answers(ports[0]):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _answers(port: int) -> bool:
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def test_checkpoints_are_told_from_the_start(run_phase, tiny_model_dir, tmp_path, monkeypatch):
    """An alert counts from the attempt's begin, then from the newest checkpoint."""
    told: list[tuple[str, int]] = []
    for name in ("will_checkpoint", "checkpointed"):
        monkeypatch.setattr(Meter, name, lambda self, step, name=name: told.append((name, step)))
    spec, output = spec_for(tiny_model_dir, checkpoint={"everySteps": 2}), tmp_path / "run" / "sft"
    run_phase("sft", spec, None, output)
    assert told == [("will_checkpoint", 0), ("checkpointed", 2), ("checkpointed", 4), ("checkpointed", 6)]


@pytest.mark.parametrize(("keep", "left"), [(0, None), (1, {"step-6"}), (3, {"step-4", "step-5", "step-6"})])
def test_as_many_checkpoints_stay_as_asked_for(run_phase, tiny_model_dir, tmp_path, keep, left):
    spec = spec_for(tiny_model_dir, checkpoint={"everySteps": 1, "keepLast": keep})
    run_phase("sft", spec, None, tmp_path / "run" / "sft")
    folder = tmp_path / "run" / "sft" / "checkpoints"
    assert ({path.name for path in folder.iterdir()} if folder.exists() else None) == left


def test_the_loss_is_transformers_own(reference, tiny_model_dir):
    """First step's loss against the model's own cross-entropy, one row at a time."""
    from trainers.core.order import BatchOrder
    from trainers.synthetic import generate

    output, _ = reference
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    rows = list(generate("letters", "demonstrations", 48, 0))
    total = count = 0.0
    for i in BatchOrder(48, 16, 1, 6, 0).indices(0):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": rows[i]["prompt"]}], add_generation_prompt=True, return_dict=False
        )
        answer = tokenizer(rows[i]["response"] + tokenizer.eos_token)["input_ids"]
        labels = torch.tensor([[-100] * len(prompt) + answer])
        out = model(input_ids=torch.tensor([prompt + answer]), labels=labels)
        total += out.loss.item() * len(answer)
        count += len(answer)
    first = lines(output)[0]
    assert first["loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("stop", [1, 3, 5])
def test_a_stopped_run_continues_to_the_same_weights(run_phase, stop_after, reference, tiny_model_dir, tmp_path, stop):
    output = tmp_path / "run" / "sft"
    with stop_after(stop):
        code, result = run_phase("sft", spec_for(tiny_model_dir), None, output)
    assert (code, result) == (143, None)
    code, result = run_phase("sft", spec_for(tiny_model_dir), None, output)
    assert code == 0
    assert_same(weights(output), weights(reference[0]))
    assert result.artifact_digest == reference[1].artifact_digest
    steps = [line["step"] for line in lines(output)]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    "changes",
    [
        {"parallel": {"microBatchTokens": 64}},
        {"data": {"train": [DEMONSTRATIONS], "maxLength": 64, "packing": False}},
        {"parallel": {"gradientCheckpointing": True}},
    ],
    ids=["micro-batches", "padded", "gradient-checkpointing"],
)
def test_how_a_step_is_computed_does_not_change_the_result(run_phase, reference, tiny_model_dir, tmp_path, changes):
    code, _ = run_phase("sft", spec_for(tiny_model_dir, **changes), None, tmp_path / "run" / "sft")
    assert code == 0
    assert_same(weights(tmp_path / "run" / "sft"), weights(reference[0]), tolerance=2e-5)


def test_a_finished_phase_is_reused_and_changed_data_is_not(run_phase, tiny_model_dir, tmp_path):
    data = tmp_path / "d.jsonl"
    data.write_text('{"prompt": "copy box : A B", "response": "A B"}\n' * 16)
    spec = spec_for(tiny_model_dir, data={"train": [{"files": "d.jsonl"}], "maxLength": 64}, duration={"maxSteps": 1})
    output = tmp_path / "ws" / "run" / "sft"
    _, first = run_phase("sft", spec, None, output, baseDir=str(tmp_path))
    _, again = run_phase("sft", spec, None, output, baseDir=str(tmp_path))
    assert again.finished_at == first.finished_at and again.seconds == first.seconds
    _, elsewhere = run_phase("sft", spec, None, tmp_path / "ws" / "other" / "sft", baseDir=str(tmp_path))
    assert elsewhere == first
    data.write_text('{"prompt": "copy box : A B", "response": "B A"}\n' * 16)
    _, changed = run_phase("sft", spec, None, output, baseDir=str(tmp_path))
    assert changed.digest == first.digest and changed.artifact_digest != first.artifact_digest
    assert list((tmp_path / "ws" / "run" / ".history").iterdir()), "the displaced result is kept"


def test_bf16_stays_bf16_after_a_checkpoint_and_a_restore(run_phase, stop_after, reference, tiny_model_dir, tmp_path):
    """Bit by bit the same with no checkpoint before the end, one after every step, and from a restored one."""
    spec = {"parallel": {"precision": "bf16"}}
    often = spec_for(tiny_model_dir, **spec, checkpoint={"everySteps": 1})
    outputs = [tmp_path / name / "sft" for name in ("once", "often", "stopped")]
    seldom = {"timeShare": None}
    assert run_phase("sft", spec_for(tiny_model_dir, **spec, checkpoint=seldom), None, outputs[0])[0] == 0
    assert run_phase("sft", often, None, outputs[1])[0] == 0
    with stop_after(2):
        run_phase("sft", often, None, outputs[2])
    assert run_phase("sft", often, None, outputs[2])[0] == 0
    assert_same(weights(outputs[1]), weights(outputs[0]))
    assert_same(weights(outputs[2]), weights(outputs[0]))
    first, second = (weights(path) for path in (outputs[0], reference[0]))
    assert any(not torch.equal(first[name], second[name]) for name in first), "fp32 all along"


def test_a_damaged_checkpoint_falls_back_to_the_one_before(run_phase, stop_after, reference, tiny_model_dir, tmp_path):
    output = tmp_path / "run" / "sft"
    spec = spec_for(tiny_model_dir, checkpoint={"everySteps": 1, "keepLast": 3})
    with stop_after(4):
        run_phase("sft", spec, None, output)
    (output / "checkpoints" / "step-4" / "shard-00000.safetensors").write_bytes(b"torn")
    (output / "checkpoints" / "step-3" / "state.json").write_bytes(b"\xff\xfe")
    code, _ = run_phase("sft", spec, None, output)
    assert code == 0
    assert_same(weights(output), weights(reference[0]))


def test_a_result_whose_model_is_gone_is_made_again(run_phase, tiny_model_dir, tmp_path):
    output = tmp_path / "run" / "sft"
    run_phase("sft", spec_for(tiny_model_dir), None, output)
    (output / "model" / "model.safetensors").unlink()
    code, _ = run_phase("sft", spec_for(tiny_model_dir), None, output)
    assert code == 0
    assert weights(output)


def test_an_edit_starts_over_and_keeps_the_unfinished_work(run_phase, stop_after, tiny_model_dir, tmp_path):
    output = tmp_path / "run" / "sft"
    with stop_after(3):
        run_phase("sft", spec_for(tiny_model_dir), None, output)
    code, result = run_phase("sft", spec_for(tiny_model_dir, seed=1), None, output)
    assert code == 0 and result.seed == 1
    [kept] = (tmp_path / "run" / ".history").iterdir()
    assert (kept / "checkpoints" / "step-3").is_dir()


def test_lora_is_merged_into_what_is_saved(run_phase, tiny_model_dir, tmp_path):
    spec = spec_for(tiny_model_dir, lora={"rank": 4, "targetModules": ["q_proj", "down_proj"]}, optim={"lr": 1e-2})
    code, _ = run_phase("sft", spec, None, tmp_path / "run" / "sft")
    assert code == 0
    before, after = load_file(tiny_model_dir / "model.safetensors"), weights(tmp_path / "run" / "sft")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed and all("q_proj" in name or "down_proj" in name for name in changed)


def test_lora_on_layers_that_do_not_exist_is_told_before_weights_are_read(run_phase, tiny_model_dir, tmp_path, capsys):
    shutil.copytree(tiny_model_dir, tmp_path / "model")
    save_file({"other": torch.zeros(1)}, tmp_path / "model/model.safetensors")
    spec = spec_for(tmp_path / "model", lora={"targetModules": ["qq"]})
    code, _ = run_phase("sft", spec, None, tmp_path / "run" / "sft")
    assert code == 2
    assert "lora.targetModules 'qq': no layer is called that" in capsys.readouterr().err


def test_the_best_weights_are_exported_when_asked(run_phase, tiny_model_dir, tmp_path):
    """What is trained contradicts what is held out, so the best evaluation is the first."""
    (tmp_path / "train.jsonl").write_text('{"prompt": "copy box : A B", "response": "A A"}\n' * 16)
    (tmp_path / "eval.jsonl").write_text('{"prompt": "copy box : A B", "response": "B B"}\n' * 4)
    spec = spec_for(
        tiny_model_dir,
        data={"train": [{"files": "train.jsonl"}], "eval": [{"files": "eval.jsonl"}], "maxLength": 64},
        optim={"lr": 1e-2, "schedule": "constant"},
        evaluation={"everySteps": 1, "keepBest": True},
    )
    output = tmp_path / "run" / "sft"
    code, result = run_phase("sft", spec, None, output, baseDir=str(tmp_path))
    assert code == 0
    losses = [line["eval_loss"] for line in lines(output, "eval_loss")]
    assert result.metrics["evalLoss"] == min(losses) < losses[-1]
    folders = (output / "checkpoints").glob("best-*")
    best = load_file(max(folders, key=lambda path: int(path.name[5:])) / "shard-00000.safetensors")
    assert_same(weights(output), {name.removeprefix("model/weights/model."): tensor for name, tensor in best.items()})


def test_a_diverging_run_says_so(run_phase, tiny_model_dir, tmp_path, monkeypatch):
    message = tmp_path / "termination"
    monkeypatch.setenv("ALIGNMENT_TERMINATION_LOG", str(message))
    spec = spec_for(tiny_model_dir, optim={"lr": 1e6, "weightDecay": 1e6, "schedule": "constant", "warmupRatio": 0})
    code, result = run_phase("sft", spec, None, tmp_path / "run" / "sft")
    assert (code, result) == (4, None)
    assert json.loads(message.read_text())["failure"] == "Diverged"


def test_chat_messages_train_on_assistant_turns(run_phase, tiny_model_dir, tmp_path):
    row = {"messages": [{"role": r, "content": "A B"} for r in ("system", "user", "assistant", "user", "assistant")]}
    (tmp_path / "chat.jsonl").write_text((json.dumps(row) + "\n") * 4)
    spec = spec_for(tiny_model_dir, data={"train": [{"files": "chat.jsonl"}]}, duration={"maxSteps": 1})
    code, result = run_phase("sft", spec, None, tmp_path / "run" / "sft", baseDir=str(tmp_path))
    assert code == 0 and result.data[0].rows == 4


def phase_file(path: Path, output: Path, spec: dict) -> Path:
    path.write_text(yaml.safe_dump({"output": str(output), "spec": spec}))
    return path


def start(arguments: list[str], **env: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ALIGNMENT_METRICS_PORT": "0", **env}
    return subprocess.Popen(
        [sys.executable, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.mark.slow
def test_kill_9_in_the_middle_continues_to_the_same_weights(tiny_model_dir, tmp_path):
    """A process that is killed outright, at a moment nobody chose, and its metrics endpoint while it runs."""
    spec = spec_for(tiny_model_dir, duration={"maxSteps": 300}, checkpoint={"everySteps": 10})
    output = tmp_path / "a" / "run" / "sft"
    file = phase_file(tmp_path / "a.yaml", output, spec)
    process = start(["-m", "trainers", "sft", "--spec", str(file)])
    wait_for(lambda: any((output / "checkpoints").glob("step-*")), process)
    port = PhaseDir(output).read_progress().metrics_port
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    process.send_signal(signal.SIGKILL)
    process.wait()
    for name in (
        "tokens_total",
        "loss",
        "learning_rate",
        "grad_norm",
        "eta_seconds",
        "memory_bytes",
        "part_seconds_total",
    ):
        assert f"alignment_trainer_{name}{{" in text
    assert PhaseDir(output).read_result() is None
    assert start(["-m", "trainers", "sft", "--spec", str(file)]).wait(120) == 0
    undisturbed = phase_file(tmp_path / "b.yaml", tmp_path / "b" / "run" / "sft", spec)
    assert start(["-m", "trainers", "sft", "--spec", str(undisturbed)]).wait(120) == 0
    assert_same(weights(output), weights(tmp_path / "b" / "run" / "sft"))


@pytest.mark.slow
def test_two_processes_give_what_one_gives(reference, tiny_model_dir, tmp_path):
    output = tmp_path / "run" / "sft"
    file = phase_file(tmp_path / "a.yaml", output, spec_for(tiny_model_dir))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = start([*torchrun, "-m", "trainers", "sft", "--spec", str(file)])
    out, _ = process.communicate(timeout=900)
    assert process.returncode == 0, out.decode()
    assert_same(weights(output), weights(reference[0]), tolerance=2e-5)


def wait_for(condition, process: subprocess.Popen, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---------------------------------------------------------------- the format of conversations


def test_no_row_is_longer_than_the_models_positions(run_phase, tmp_path):
    """maxLength is 1024 unless set, and a model of 12 positions would be trained on places that it has never seen."""
    rows = [{"prompt": "a " * n, "response": "b"} for n in (2, 20)] + [{"prompt": "a", "response": "b " * 20}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = {"kind": "word", "trainOn": [{"files": "rows.jsonl"}]}
    model = {"scratch": {"hiddenSize": 8, "numLayers": 1, "numHeads": 2, "maxPositions": 12, "tokenizer": words}}
    spec = {"model": model, "data": {"train": [{"files": "rows.jsonl"}]}, "duration": {"maxSteps": 1}}
    code, result = run_phase("sft", spec, None, tmp_path / "run" / "sft", base_dir=str(tmp_path))
    assert code == 0
    assert [(record.rows, record.dropped, record.shortened) for record in result.data] == [(2, 1, 1)]


def test_a_base_model_takes_on_a_template_and_keeps_it(run_phase, tiny_model_dir, tmp_path):
    template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}{% if m.role == 'assistant' %} <unk>{% endif %} {% endfor %}"
    template += "{% if add_generation_prompt %}<assistant> {% endif %}"
    (tmp_path / "chat.jinja").write_text(template)
    model = {"source": str(tiny_model_dir), "chatTemplate": "chat.jinja", "endToken": "<unk>"}
    spec = spec_for(tiny_model_dir, duration={"maxSteps": 1}) | {"model": model}
    code, _ = run_phase("sft", spec, None, tmp_path / "run" / "sft", base_dir=str(tmp_path))
    assert code == 0
    saved = AutoTokenizer.from_pretrained(tmp_path / "run" / "sft" / "model")
    assert (saved.chat_template, saved.eos_token) == (template, "<unk>")


def test_a_conversation_that_the_template_refuses_is_named_by_its_row(run_phase, tiny_model_dir, tmp_path, capfd):
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    template += AutoTokenizer.from_pretrained(tiny_model_dir).chat_template
    turns = [{"role": role, "content": "A"} for role in ("system", "user", "assistant")]
    rows = [{"messages": turns[1:]}, {"messages": turns}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = {"source": str(tiny_model_dir), "chatTemplate": template}
    spec = spec_for(tiny_model_dir, data={"train": [{"files": "rows.jsonl"}]}) | {"model": model}
    code, _ = run_phase("sft", spec, None, tmp_path / "run" / "sft", base_dir=str(tmp_path))
    assert code == 2
    assert (
        "rows.jsonl:2: the chat template refuses a conversation of system, user: no system turn"
        in capfd.readouterr().err
    )
