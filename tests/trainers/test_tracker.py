"""Weights & Biases: a run of its own for what is run anew, and never the reason that a phase fails."""

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from trainers.contract import Identity, Origins
from trainers.meter import Meter
from trainers.phase_dir import PhaseDir, open_directory
from trainers.spec import Tracking

LABELS = {"run": "r", "phase": "p", "type": "sft", "rank": "0"}


class Wandb(types.ModuleType):
    """Stands in for the package, which is not a dependency: its ``init`` and its runs, as version 0.31 has them."""

    def __init__(self, refusal: Exception | None = None, breaks: bool = False) -> None:
        super().__init__("wandb")
        self.refusal, self.breaks = refusal, breaks
        self.runs: dict[str, list[tuple[int, dict[str, float]]]] = {}
        self.finished: list[str] = []
        self.Settings = types.SimpleNamespace

    def init(self, **options: Any) -> Any:
        assert options["resume"] == "allow"
        assert options["settings"].init_timeout <= 30, "90 s by default"
        if self.refusal is not None:
            raise self.refusal
        name = options["id"]
        self.runs.setdefault(name, [])
        return types.SimpleNamespace(
            log=lambda values, step: self._log(name, values, step), finish=lambda: self.finished.append(name)
        )

    def _log(self, name: str, values: dict[str, float], step: int) -> None:
        if self.breaks:
            raise ConnectionError("broken pipe")
        self.runs[name].append((step, values))


def attempt(
    monkeypatch: pytest.MonkeyPatch, wandb: types.ModuleType | None, root: Path, identity: Identity, *steps: int
) -> None:
    """One start of a phase that logs these steps."""
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    directory = PhaseDir(root)
    open_directory(directory, identity)
    meter = Meter(directory, LABELS, 0, Tracking(wandb_project="project"))
    meter.begin(steps[0] - 1, 10)
    for step in steps:
        meter.log(step, loss=1.0 / step)
    meter.close()


def test_attempts_at_one_result_share_a_run_and_an_edited_phase_has_its_own(monkeypatch, tmp_path):
    wandb, root = Wandb(), tmp_path / "run" / "sft"
    first, edited = Identity(digest="a"), Identity(digest="a", origins=Origins(content={"data.train[0]": "new"}))
    attempt(monkeypatch, wandb, root, first, 1, 2)
    attempt(monkeypatch, wandb, root, first, 3)
    attempt(monkeypatch, wandb, root, edited, 1)
    attempt(monkeypatch, wandb, root, first, 1)  # edited back, and run again
    logged = [[step for step, _ in run] for run in wandb.runs.values()]
    assert logged == [[1, 2, 3], [1], [1]]
    assert len(wandb.finished) == 4


@pytest.mark.parametrize(
    ("wandb", "said"),
    [
        (None, "import of wandb halted; None in sys.modules"),
        (Wandb(RuntimeError("No API key configured. Use `wandb login` to log in.")), "No API key configured"),
        (Wandb(OSError("Failed to get resume status\nwhile retrying")), "Failed to get resume status;"),
        (Wandb(breaks=True), "broken pipe"),
    ],
)
def test_what_goes_wrong_costs_one_line_and_metrics_are_written(monkeypatch, tmp_path, capfd, wandb, said):
    attempt(monkeypatch, wandb, tmp_path / "run" / "sft", Identity(digest="a"), 1, 2)
    lines = [line for line in capfd.readouterr().err.splitlines() if "Weights & Biases" in line]
    assert len(lines) == 1
    assert said in lines[0]
    assert lines[0].endswith("metrics go to metrics.jsonl only")
    written = (tmp_path / "run" / "sft" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in written] == [1, 2]


def test_progress_is_json_whatever_the_loss_is(monkeypatch, tmp_path):
    directory = PhaseDir(tmp_path)
    meter = Meter(directory, LABELS, 0, Tracking())
    meter.begin(0, 2)
    meter.log(1, loss=float("nan"))
    meter.stage("saving")
    meter.close()

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    assert "loss" not in json.loads(directory.progress.read_text(), parse_constant=refuse)
