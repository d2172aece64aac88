"""The rows of the tables: what is measured for each, by both sides in turns."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from figures import Sampled, Side, Work
from work import order
from workers import FailedError, Peers

TRAINING = ("sft", "reward", "dpo", "traces", "samples", "ppo")
KINDS = (*TRAINING, "sampling")
SIDES = {"sft": ("ours", "trl", "trl grouped", "trl padding-free"), "ppo": ("ours", "trl-ppo")}
"""Grouping by length, and all rows as one without padding, may serve TRL better for SFT than what it does by itself."""
LENGTHS = ("uniform", "varied")
"""Of responses, where nothing but sampling is measured."""
STEPS = {"samples": 6, "ppo": 4}
OTHERWISE = 8
LARGE, OF_LARGE = 16, 5
"""From this batch on steps are long, and fewer of them tell as much."""
SAME_LOSSES = ("sft", "reward", "dpo", "traces")
"""Work whose losses are a function of the rows alone."""
TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}
"""Of losses, as a share: fp32 and bf16."""


@dataclass(frozen=True)
class How:
    """What all rows have in common."""

    device: str
    rounds: int
    tokens: int
    steps: int | None
    folder: Path


@dataclass(frozen=True)
class Training:
    kind: str
    batch: int

    @property
    def name(self) -> str:
        return f"{self.kind} {self.batch}"

    def measured(self, peers: Peers, how: How) -> dict[str, Any]:
        """Rounds by side. Raises FailedError where a side fails, or computes something else."""
        steps = how.steps or self._steps()
        rows = order(self.batch, steps)
        job = {"kind": self.kind, "batch": self.batch, "steps": steps, "tokens": how.tokens, "order": rows}
        job |= {"folder": str(how.folder), "device": how.device}
        rounds: dict[str, list[Any]] = {name: [] for name in SIDES.get(self.kind, ("ours", "trl"))}
        with tempfile.TemporaryDirectory() as out:
            for number in range(how.rounds):
                for name, found in rounds.items():
                    found.append(peers.do(name, job | {"out": f"{out}/out"}))
                if number == 0:
                    check(self.read({"rounds": rounds}), how.device)
        return {
            "rounds": rounds,
            **(peers.do("roof", job | _tokens(how.folder, rows, steps)) if self.kind == "sft" else {}),
        }

    def read(self, found: dict[str, Any]) -> Work:
        sides = {name: Side(rounds) for name, rounds in found["rounds"].items()}
        return Work(self.kind, self.batch, sides, found.get("roofs", {}))

    def _steps(self) -> int:
        steps = STEPS.get(self.kind, OTHERWISE)
        return min(steps, OF_LARGE) if self.batch >= LARGE else steps


@dataclass(frozen=True)
class Sampling:
    batch: int
    lengths: str

    @property
    def name(self) -> str:
        return f"sampling {self.batch} {self.lengths}"

    def measured(self, peers: Peers, how: How) -> dict[str, Any]:
        """Both sides are in one process, with one model. Raises FailedError."""
        job = {"batch": self.batch, "tokens": how.tokens, "rounds": how.rounds, "folder": str(how.folder)}
        found = peers.do(f"sampling {self.lengths}", job | {"device": how.device})
        return {name: found[name] for name in ("sides", "roofs")}

    def read(self, found: dict[str, Any]) -> Sampled:
        return Sampled(self.batch, self.lengths, found["sides"], found["roofs"])


def tasks(kinds: list[str], batches: list[int], rows: list[int]) -> list[Training | Sampling]:
    """``rows``: that are sampled side by side, where nothing else is measured."""
    training = [Training(kind, batch) for kind in kinds if kind != "sampling" for batch in batches]
    sampling = [Sampling(count, lengths) for count in rows for lengths in LENGTHS] if "sampling" in kinds else []
    return [*training, *sampling]


def check(work: Work, device: str) -> None:
    """Raise FailedError where losses that should be the same are not, or tokens are others."""
    if work.kind not in SAME_LOSSES:
        return
    counts = {name: side.rounds[0]["marks"][-1][2] for name, side in work.sides.items() if "grouped" not in name}
    if len(set(counts.values())) > 1:
        raise FailedError(f"the sides have not had the same tokens: {counts}")
    if not work.residual() <= TOLERANCE[device]:
        losses = {name: side.losses for name, side in work.sides.items()}
        raise FailedError(f"the steps' losses differ by {work.residual():.1e}, so nothing can be compared: {losses}")


def _tokens(folder: Path, rows: list[int], steps: int) -> dict[str, int]:
    """Tokens of an SFT step in the mean, and those that are scored."""
    found = [json.loads(line) for line in (folder / "tokens.jsonl").read_text().splitlines()]
    asked, said = (sum(len(found[i][part]) for i in rows) // steps for part in ("prompt", "chosen"))
    return {"rows": asked + said, "scored": said}
