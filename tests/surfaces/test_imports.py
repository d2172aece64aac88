"""What reading a run costs: no torch, no transformers, not much time. Tried in a bare process."""

import subprocess
import sys
from pathlib import Path

import pytest

import controller
import trainers
from controller.cli import app
from trainers.phases import REGISTRY

ROOT = Path(__file__).resolve().parents[2]

OPERATOR = {f"controller/operator/{name}.py" for name in ("app", "handlers", "login", "logs")}
"""What only the operator's process imports, and what needs kopf."""

LIGHT = sorted(
    [".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for p in (ROOT / "controller").rglob("*.py")
     if p.name != "leash.py" and p.relative_to(ROOT).as_posix() not in OPERATOR]
    + [entry.spec.__module__ for entry in REGISTRY]
    + ["trainers.contract", "trainers.fingerprints", "trainers.metrics", "trainers.phases", "trainers.spec", "trainers.synthetic"]
)  # fmt: skip

HEAVY = ("torch", "transformers", "accelerate", "datasets", "peft", "deepspeed", "numpy", "kopf", "kubernetes")

PROGRAM = """
import importlib, sys
chain = []
class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in HEAVY:
            frame, files = sys._getframe(1), []
            while frame:
                file = frame.f_code.co_filename
                if "importlib" not in file and file not in files:
                    files.append(f"{file}:{frame.f_lineno}")
                frame = frame.f_back
            raise SystemExit(f"{module} imports {name}:\\n  " + "\\n  ".join(reversed(files)))
sys.meta_path.insert(0, Guard())
for module in MODULES:
    importlib.import_module(module)
"""


def test_the_control_plane_and_every_spec_import_without_the_heavy_packages() -> None:
    program = f"HEAVY = {HEAVY!r}\nMODULES = {LIGHT!r}\n{PROGRAM}"
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_both_packages_are_those_of_this_repository() -> None:
    assert Path(controller.__file__).parents[1] == Path(trainers.__file__).parents[1] == ROOT


def test_packages_import_from_any_directory(tmp_path: Path) -> None:
    (tmp_path / "trainers").mkdir()
    command = [sys.executable, "-P", "-c", "import trainers; print(trainers.__file__)"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(ROOT / "trainers/__init__.py")


@pytest.mark.parametrize(
    "command", ["run", "validate", "plan", "status", "logs", "stop", "resume", "retry", "runs", "history"]
)
def test_commands(command: str) -> None:
    """Frozen: scripts rely on these."""
    assert command in {entry.name or entry.callback.__name__ for entry in app.registered_commands}  # type: ignore[union-attr]
