"""One cell of the matrix: a phase run on a family in a precision, and what has to be true afterwards.

Each function runs its phase as a user does and compares what it leaves with transformers alone.
"""

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from trainers.synthetic import generate

PLAIN = {"lr": 5e-3, "schedule": "constant", "warmupRatio": 0.0, "weightDecay": 0.0}
PAIRS = {"synthetic": {"task": "letters", "split": "preferences", "count": 16}}
PROMPTS = {"prompts": [{"synthetic": {"task": "letters", "split": "prompts", "count": 8}}], "maxPromptLength": 32}
ROUNDING = {"fp32": 1e-4, "bf16": 3e-2}
"""Of a mean loss, against transformers' own arithmetic in the same precision."""


class Refused(Exception):
    """The phase ended with bad input."""


@dataclass(frozen=True)
class Cell:
    """Where a cell works and what it works with."""

    model: Path
    """The family's model: two layers, random weights, its tokenizer."""
    reward_model: Path | None
    """A classifier of the family with random weights; None where transformers has none."""
    precision: str
    root: Path
    run_phase: Callable[..., tuple[int, Any]]
    stop_after: Callable[[int], AbstractContextManager[None]]

    def run(
        self, kind: str, spec: dict[str, Any], stop: int | None = None, inputs: dict[str, Path] | None = None
    ) -> Path:
        """The phase's folder. With ``stop`` it is stopped after that step and started again."""
        output = self.root / (f"{kind}-stopped" if stop else kind) / "run" / kind
        spec = {**spec, "parallel": {"precision": self.precision}}
        if stop:
            with self.stop_after(stop):
                code, _ = self.run_phase(kind, spec, inputs, output)
            assert code == 143
        code, _ = self.run_phase(kind, spec, inputs, output)
        if code == 2:
            raise Refused(kind)
        assert code == 0, f"{kind} ended with {code}"
        return output

    def twice(self, kind: str, spec: dict[str, Any], stop: int) -> Path:
        """Run it undisturbed, and stopped: both leave the same model, bit for bit."""
        whole, resumed = self.run(kind, spec), self.run(kind, spec, stop)
        for file in (whole / "model").glob("*.safetensors"):
            assert file.read_bytes() == (resumed / "model" / file.name).read_bytes(), "resuming changed the model"
        return whole


def sft(cell: Cell) -> None:
    # transformers gives Qwen2 a tokenizer of its own, which leaves out words; letters it knows.
    known = (row for row in generate("letters", "demonstrations", 64, 0) if row["response"].isupper())
    rows = [row for row in known if len(row["response"].split()) < 4][:4]
    write(cell.root / "rows.jsonl", rows)
    data = {"train": [{"files": str(cell.root / "rows.jsonl")}], "eval": [{"files": str(cell.root / "rows.jsonl")}]}
    spec = {"model": {"source": str(cell.model)}, "data": data, "optim": PLAIN, "batchSize": 4}
    output = cell.twice("sft", {**spec, "duration": {"maxSteps": 40}}, stop=3)
    losses = curve(output, "loss")
    assert losses[-1] < 0.5 * losses[0]
    model, tokenizer = exported(output)
    expected = mean_loss(model, tokenizer, rows, cell.precision)
    assert metrics(output)["evalLoss"] == pytest.approx(
        expected, rel=ROUNDING[cell.precision], abs=ROUNDING[cell.precision]
    )
    assert_stops(model, tokenizer, rows)


def reward(cell: Cell) -> None:
    spec = {"model": {"source": str(cell.model)}, "data": {"train": [PAIRS], "eval": [PAIRS]}, "optim": PLAIN}
    output = cell.twice("reward", {**spec, "batchSize": 16, "duration": {"maxSteps": 12}}, stop=3)
    losses = curve(output, "loss")
    assert losses[-1] < 0.8 * losses[0]
    model, tokenizer = exported(output, AutoModelForSequenceClassification)
    rows = list(generate("letters", "preferences", 16, 0))
    margins = [score(model, tokenizer, row, "chosen") - score(model, tokenizer, row, "rejected") for row in rows]
    expected = torch.nn.functional.softplus(-torch.tensor(margins)).mean().item()
    assert metrics(output)["evalLoss"] == pytest.approx(
        expected, rel=10 * ROUNDING[cell.precision], abs=ROUNDING[cell.precision]
    )


def dpo(cell: Cell) -> None:
    spec = {"policy": {"source": str(cell.model)}, "data": {"train": [PAIRS]}, "optim": {**PLAIN, "lr": 1e-3}}
    output = cell.twice("dpo", {**spec, "batchSize": 16, "duration": {"maxSteps": 6}}, stop=3)
    losses = curve(output, "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6), "the reference is the policy at step 0"
    assert losses[-1] < 0.9 * losses[0]
    exported(output)


def ppo(cell: Cell) -> None:
    spec = {
        "policy": {"source": str(cell.model)},
        "rewardModel": {"source": str(cell.reward_model)},
        "data": PROMPTS,
        "iterations": 3,
        "batchSize": 8,
        "ppoEpochs": 2,
        "sampling": {"maxNewTokens": 6, "batchSize": 8},
        "optim": {**PLAIN, "lr": 1e-3},
        "criticOptim": {**PLAIN, "lr": 1e-3},
    }
    output = cell.twice("ppo", spec, stop=1)
    assert curve(output, "kl")[0] == 0.0, "the reference is the policy at step 0"
    assert curve(output, "kl")[-1] > 0.0
    exported(output)


def rollout(cell: Cell) -> None:
    spec = {
        "policy": {"source": str(cell.model)},
        "data": PROMPTS,
        "sampling": {"maxNewTokens": 8, "batchSize": 8, "temperature": 0},
    }
    if cell.reward_model is not None:
        spec["rewardModel"] = {"source": str(cell.reward_model)}
    output = cell.run("rollout", spec)
    rows = [json.loads(line) for line in (output / "traces.jsonl").read_text().split("\n") if line]
    assert len(rows) == 8
    if cell.precision == "bf16":  # near ties fall otherwise in another layout
        return
    tokenizer = AutoTokenizer.from_pretrained(cell.model)
    model = AutoModelForCausalLM.from_pretrained(cell.model)
    for row in rows:
        assert row["teacher_response"] == plain_answer(model, tokenizer, row["prompt"], 8)[0]


def distill(cell: Cell) -> None:
    rows = list(generate("letters", "demonstrations", 8, 0))
    traces = [{"prompt": r["prompt"], "teacher_response": r["response"], "reward": 1.0} for r in rows]
    write(cell.root / "traces.jsonl", traces)
    spec = {
        "teacher": {"source": str(cell.model)},
        "student": {"source": str(moved(cell.model, cell.root / "student"))},
        "traces": {"files": str(cell.root / "traces.jsonl")},
        "prompts": PROMPTS,
        "sampling": {"maxNewTokens": 6, "batchSize": 8},
        "maxLength": 48,
        "batchSize": 8,
        "duration": {"maxSteps": 12},
        "optim": {**PLAIN, "lr": 2e-3},
    }
    output = cell.twice("distill", spec, stop=3)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    stored = [line["kl"] for line in lines if line.get("on_policy") == 0.0]
    assert stored[-1] < 0.8 * stored[0]
    exported(output)


def evaluate(cell: Cell) -> None:
    rows = list(generate("letters", "demonstrations", 8, 0))
    write(cell.root / "test.jsonl", rows)
    spec = {
        "models": [{"name": "a", "source": str(cell.model)}],
        "baseline": "a",
        "data": {"rows": [{"files": str(cell.root / "test.jsonl")}]},
        "sampling": {"maxNewTokens": 6, "temperature": 0},
        "benchmarks": [
            {"name": "fit", "perplexity": {}},
            {"name": "drift", "kl": {}},
            {"name": "length", "length": {}},
        ],
        "latency": {"promptLengths": [8], "newTokens": 4, "batchSizes": [1, 4], "repeats": 1},
    }
    output = cell.run("evaluate", spec)
    found = metrics(output)
    model = AutoModelForCausalLM.from_pretrained(cell.model)
    expected = math.exp(mean_loss(model, AutoTokenizer.from_pretrained(cell.model), rows, cell.precision))
    assert found["a/fit/perplexity"] == pytest.approx(expected, rel=ROUNDING[cell.precision] * 5)
    assert found["a/drift/perToken"] == pytest.approx(0.0, abs=1e-6)


def package(cell: Cell) -> None:
    data = {"train": [{"synthetic": {"task": "letters", "split": "demonstrations", "count": 8}}]}
    spec = {"model": {"source": str(cell.model)}, "data": data, "duration": {"maxSteps": 1}, "batchSize": 8}
    trained = cell.run("sft", spec)
    output = cell.run("package", {}, inputs={"sft": trained})
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(trained / "model"),
        AutoTokenizer.from_pretrained(trained / "model"),
    )
    ids = torch.arange(3, 12)[None]
    packaged = AutoModelForCausalLM.from_pretrained(output / "models" / "sft")
    assert torch.equal(packaged(input_ids=ids).logits, model(input_ids=ids).logits)
    assert AutoTokenizer.from_pretrained(output / "models" / "sft").chat_template == tokenizer.chat_template


PHASES = {f.__name__: f for f in (sft, reward, dpo, ppo, rollout, distill, evaluate, package)}


# ---------------------------------------------------------------- what transformers alone says


def exported(output: Path, auto: Any = AutoModelForCausalLM) -> tuple[Any, Any]:
    model, unused = auto.from_pretrained(output / "model", output_loading_info=True)
    assert not any(unused[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), unused
    return model.eval(), AutoTokenizer.from_pretrained(output / "model")


@torch.no_grad()
def mean_loss(model: Any, tokenizer: Any, rows: list[dict[str, Any]], precision: str) -> float:
    """Per response token, one row at a time, from transformers' own logits."""
    total = count = 0.0
    for row in rows:
        prompt, answer = (
            tokens(tokenizer, row["prompt"]),
            tokenizer(row["response"])["input_ids"] + [tokenizer.eos_token_id],
        )
        ids = torch.tensor([prompt + answer])
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
        count += len(answer)
    return total / count


@torch.no_grad()
def score(model: Any, tokenizer: Any, row: dict[str, Any], side: str) -> float:
    ids = tokens(tokenizer, row["prompt"]) + tokenizer(row[side])["input_ids"] + [tokenizer.eos_token_id]
    return float(model(input_ids=torch.tensor([ids])).logits)


def tokens(tokenizer: Any, prompt: str) -> list[int]:
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def plain_answer(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> tuple[str, list[int]]:
    ids = torch.tensor([tokens(tokenizer, prompt)])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new_tokens)
    answer = out[0, ids.shape[1] :].tolist()
    return tokenizer.decode(answer, skip_special_tokens=True), answer


def assert_stops(model: Any, tokenizer: Any, rows: list[dict[str, Any]]) -> None:
    """Having learnt the rows by heart, it answers them and ends, under transformers' generate with no settings."""
    for row in rows:
        _, answer = plain_answer(model, tokenizer, row["prompt"], 20)
        assert answer == [*tokenizer(row["response"])["input_ids"], tokenizer.eos_token_id]


def moved(model: Path, target: Path) -> Path:
    """A student: the same model with its weights a little elsewhere."""
    torch.manual_seed(3)
    student = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    student.save_pretrained(target)
    AutoTokenizer.from_pretrained(model).save_pretrained(target)
    return target


def curve(output: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def metrics(output: Path) -> dict[str, float]:
    return json.loads((output / "result.json").read_text())["metrics"]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
