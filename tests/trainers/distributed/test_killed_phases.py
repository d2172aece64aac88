"""A phase that is killed at some operation on its files, and begun again, leaves what an undisturbed one leaves."""

import os
import random
import re
import shutil
from pathlib import Path

import pytest
from distributed.cells import SINGLE, Way, phases
from distributed.conftest import output_of, write
from kill_points import killed, operations

from trainers import launch
from trainers.files import tree_digest

KINDS = ("sft", "rollout", "evaluate", "package")
ALONE = Way(SINGLE, processes=1)
POINTS = 4
"""Operations, of different kinds, at which each is killed; ``SEED`` chooses others."""

TIMED = re.compile(r"(metrics|progress|result|phase|identity)\.jsonl?|report\.html|.*\.svg")
"""Files that say how long something took, and when."""

pytestmark = pytest.mark.distributed


@pytest.fixture
def work(tiny_model_dir, tiny_reward_dir, run_way, monkeypatch):
    """``work(kind)``: a phase in a folder, and the digests of what it leaves."""
    monkeypatch.setenv("ALIGNMENT_METRICS_PORT", "0")

    def of(kind):
        made = run_way(ALONE, ("sft", "evaluate")) if kind == "package" else {}
        inputs = {name: {"path": str(path), "digest": name} for name, path in made.items()}
        spec = phases(tiny_model_dir, tiny_reward_dir, [kind])[kind]
        spec = ALONE.document(kind, spec) | ({"teacherTopK": 4} if kind == "rollout" else {})

        def begin(folder: Path) -> dict[str, str]:
            output = output_of(folder, kind)
            file = write(folder / f"{kind}.yaml", output, {} if kind == "package" else spec, inputs)
            assert launch.run_phase(kind, file, []) == 0
            assert not list(output.rglob("*.tmp"))
            return {
                path.relative_to(output).as_posix(): tree_digest(path)
                for path in sorted(output.rglob("*"))
                if path.is_file() and not TIMED.fullmatch(path.name) and "checkpoints" not in path.parts
            }

        return begin

    return of


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_an_operation_and_begun_again(kind, work, tmp_path):
    begin = work(kind)
    seen = operations(begin, tmp_path / "whole")
    wanted = begin(tmp_path / "whole")
    for at in chosen(seen, f"{os.environ.get('SEED', '0')} {kind}"):
        folder = tmp_path / f"killed-{at}"
        killed(begin, folder, at)
        operations(begin, folder)  # by a process of its own, as an attempt is
        assert begin(folder) == wanted, seen[at]
        shutil.rmtree(folder)


def chosen(seen, key):
    """Some operations, each of another kind."""
    kinds: dict[str, list[int]] = {}
    for at, what in enumerate(seen):
        kinds.setdefault(re.sub(r"[0-9a-f]{8,}|\d+", "N", what), []).append(at)
    rng = random.Random(key)
    return [rng.choice(kinds[kind]) for kind in rng.sample(sorted(kinds), min(POINTS, len(kinds)))]
