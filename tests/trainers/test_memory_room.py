"""Responses side by side, by what a device's memory holds; against keys and values counted by hand."""

import json
import os
import signal
from itertools import pairwise

import pytest

from trainers import memory_room
from trainers.contract import HALVINGS_VARIABLE, BadInput
from trainers.core import rollouts
from trainers.memory_room import halvings
from trainers.phases.ppo.spec import PpoSpec
from trainers.phases.rollout.parts import Parts
from trainers.phases.rollout.spec import RolloutSpec
from trainers.sizing.devices import CPU_RESERVE
from trainers.sizing.machine import machine_memory
from trainers.sizing.memory import Place
from trainers.sizing.rows import most_rows, of_steps, with_fewer_rows
from trainers.sizing.shapes import shape_of
from trainers.spec import Parallel, PhaseSpec, shrunk

LAYERS, HEADS, WIDTH, PROMPT, NEW = 4, 2, 32, 16, 4000
CONFIG = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS,
    "num_attention_heads": 2, "num_key_value_heads": HEADS, "head_dim": WIDTH, "max_position_embeddings": 8192,
}  # fmt: skip
ROW = 2 * 4 * LAYERS * HEADS * WIDTH * (PROMPT + NEW)
"""Bytes of a row's keys and values."""
GROWING = ROW * (LAYERS + 1) / LAYERS
"""Of one layer they are there twice while they grow."""


def spec(rows: int = 64) -> RolloutSpec:
    data = {"prompts": [{"files": "prompts.jsonl"}], "maxPromptLength": PROMPT}
    sampling = {"maxNewTokens": NEW, "batchSize": rows}
    return RolloutSpec.model_validate({"policy": {"source": "m"}, "data": data, "sampling": sampling})


def rows(memory: int, most: int = 64) -> int:
    return most >> halvings(spec(most), Place(Parallel()), lambda ref: shape_of(CONFIG), memory)


@pytest.mark.parametrize(("room", "wanted"), [(100, 64), (60, 32), (24, 16), (6, 4), (1.6, 1)])
def test_as_many_rows_as_there_is_room_for_by_halves(room, wanted):
    assert rows(CPU_RESERVE + int(room * GROWING)) == wanted


def test_one_row_that_is_sure_not_to_fit_is_refused_with_the_figures():
    with pytest.raises(BadInput, match=r"sampling\.batchSize 1 would need .* GiB and a device has 0\.0"):
        rows(int(GROWING / 1.5))
    assert rows(int(GROWING / 1.05), most=1) == 1, "a plan may be off by so much"
    assert rows(int(GROWING / 1.05)) == 1, "and not all of them because by the plan not even one fits"


def of_attempts(phase: PhaseSpec, memory: int, many: int = 8) -> list[int]:
    """Rows of attempts that each follow one which ran out of memory, from the settings that they are given."""
    found = []
    for halved in range(many):
        given = shrunk(phase, halved)
        times = halvings(given, Place(Parallel()), lambda ref: shape_of(CONFIG), memory, halved)
        found.append(most_rows(of_steps(with_fewer_rows(given, times), 1, halved)))
    return found


@pytest.mark.parametrize("room", [300, 100, 60, 24, 6, 1.6, 0.96])
@pytest.mark.parametrize("most", [64, 101, 5, 1])
def test_an_attempt_after_one_that_ran_out_of_memory_has_fewer_rows_than_that(most, room):
    """Where all fit by the plan, where the phase lowers them itself, and where not one fits."""
    memory = CPU_RESERVE + int(room * GROWING) if room > 1 else int(GROWING / 1.05)
    counts = of_attempts(spec(most), memory)
    assert counts[0] == rows(memory, most)
    assert all(fewer == max(1, more // 2) for more, fewer in pairwise(counts)), "half each, and no less"


def test_rows_of_steps_that_have_fewer_responses_than_allowed_are_fewer_each_time_too():
    data = {"prompts": [{"files": "prompts.jsonl"}], "maxPromptLength": PROMPT}
    models = {"policy": {"source": "m"}, "rewardModel": {"source": "m"}, "sampling": {"batchSize": 512}}
    ppo = PpoSpec.model_validate({**models, "data": data, "iterations": 1, "batchSize": 24})
    assert of_attempts(ppo, 2**40, 5) == [512, 12, 6, 3, 1], "the first has 24 of 512"


@pytest.fixture
def letters(tiny_model_dir):
    data = {"prompts": [{"synthetic": {"task": "letters", "split": "prompts", "count": 9}}], "maxPromptLength": 32}
    sampling = {"maxNewTokens": 64, "batchSize": 8}
    return {"policy": {"source": str(tiny_model_dir)}, "data": data, "seed": 5, "sampling": sampling}


@pytest.fixture
def scarce(monkeypatch, tiny_model_dir):
    """A machine that holds six of these rows beside the model; reading prompts wants as much as the rows of some."""
    config = json.loads((tiny_model_dir / "config.json").read_text())
    size = sum(file.stat().st_size for file in tiny_model_dir.glob("*.safetensors"))
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    row = 2 * 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * head * (32 + 64)
    return lambda: monkeypatch.setattr(memory_room, "machine_memory", lambda: CPU_RESERVE + size + 6 * row)


def test_a_phase_goes_with_fewer_also_when_it_resumes_and_says_the_same(
    run_phase, letters, scarce, tmp_path, monkeypatch, capfd
):
    ample, output = tmp_path / "ample" / "run" / "rollout", tmp_path / "scarce" / "run" / "rollout"
    assert run_phase("rollout", letters, None, ample)[0] == 0
    assert "side by side" not in capfd.readouterr().out
    write, written = Parts.write, []

    def stopping(self, first, last, some):
        write(self, first, last, some)
        written.append((first, last))
        if len(written) == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Parts, "write", stopping)
    scarce()
    assert [run_phase("rollout", letters, None, output)[0] for _ in range(2)] == [143, 0]
    assert written == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 9)]
    assert capfd.readouterr().out.count("2 responses are sampled side by side instead of sampling.batchSize 8") == 2
    assert (output / "traces.jsonl").read_text() == (ample / "traces.jsonl").read_text()


@pytest.fixture
def side_by_side(monkeypatch):
    """How many rows are sampled side by side, of as many as there are."""
    seen = []

    def generate(model, prompts, sampling, *rest, **more):
        seen.append((min(len(prompts), sampling.batch_size), len(prompts)))
        return own(model, prompts, sampling, *rest, **more)

    own = rollouts.generate
    monkeypatch.setattr(rollouts, "generate", generate)
    return seen


def test_fewer_responses_than_allowed_are_fewer_side_by_side_in_a_next_attempt(
    run_phase, letters, tiny_model_dir, side_by_side, scarce, tmp_path, monkeypatch
):
    output = tmp_path / "run" / "rollout"
    halved = {**letters, "sampling": {"maxNewTokens": 4, "batchSize": 32}}  # of 64, and there are nine
    monkeypatch.setenv(HALVINGS_VARIABLE, "1")
    assert run_phase("rollout", halved, None, output)[0] == 0
    assert side_by_side == [(4, 4), (4, 4), (1, 1)]
    side_by_side.clear()
    rows = [{"synthetic": {"task": "letters", "split": "test", "count": 9}}]
    models = [{"name": "m", "source": str(tiny_model_dir)}]
    asked = {"models": models, "benchmarks": [{"name": "n", "length": {}}], "data": {"rows": rows}}
    asked |= {"sampling": {"maxNewTokens": 4, "batchSize": 32}}
    assert run_phase("evaluate", asked, None, tmp_path / "run" / "evaluate")[0] == 0
    assert side_by_side == [(4, 9)]
    side_by_side.clear()
    scarce()  # two of eight fit, as above, and ran out of memory
    again = {**letters, "sampling": {**letters["sampling"], "batchSize": 4}}
    assert run_phase("rollout", again, None, tmp_path / "again" / "rollout")[0] == 0
    assert side_by_side == [(1, 1)] * 9


def test_the_smallest_limit_of_groups_within_each_other_counts(tmp_path):
    own = tmp_path / "own"
    own.write_text("0::/a/b\n")
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "memory.max").write_text("max\n")
    whole = machine_memory(tmp_path, own)
    (tmp_path / "a" / "memory.max").write_text(f"{2**28}\n")
    assert machine_memory(tmp_path, own) == 2**28 < whole
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text(f"{2**27}\n")
    assert machine_memory(tmp_path, own) == 2**27
