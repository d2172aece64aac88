"""What a local run lacks is said before its first phase begins."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from builders import PROMPTS, document, sft

from controller.api.problems import InvalidRun
from controller.commands.run import Request, run_command
from controller.runs_folder import read_status

HERE = {"command": [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]}
WHERE = "spec.phases[r].rollout"
NO_PROGRAM = (
    f"{WHERE}.server.command: this machine has no program no-vllm: install vLLM, and set the path of what starts it"
)
NO_KEY = f"{WHERE}.policy.keyVariable: the environment has no NOBODYS_KEY: export it"


def rollout(**more: Any) -> dict[str, Any]:
    model = (
        {"phase": "base"}
        if "server" in more
        else {"source": "m", "url": "http://vllm:8000", "keyVariable": "NOBODYS_KEY"}
    )
    settings = {"policy": model, "data": PROMPTS, "sampling": {"engine": "vllm"}, **more}
    return {"name": "r", "rollout": settings}


def told(folder: Path, *phases: dict[str, Any]) -> list[str]:
    (folder / "run.yaml").write_text(json.dumps(document(sft("base"), *phases)))
    request = Request(file=folder / "run.yaml", workspace=folder / "runs")
    try:
        run_command(request, lambda job, file: [sys.executable, "-c", "raise SystemExit(3)"])
    except InvalidRun as error:
        return [str(problem) for problem in error.problems]
    return []


@pytest.mark.parametrize(
    ("phase", "said"),
    [
        (rollout(server={"command": ["no-vllm", "serve"]}), [NO_PROGRAM]),
        (rollout(server=HERE), []),
        (rollout(), [NO_KEY]),
        ({**rollout(), "template": {"env": [{"name": "NOBODYS_KEY", "value": "k"}]}}, []),
    ],
    ids=["no program", "a program", "no key", "a key of the run's"],
)
def test_before_the_first_phase(tmp_path: Path, phase: dict[str, Any], said: list[str]):
    assert told(tmp_path, phase) == said
    begun = read_status(tmp_path / "runs", "test")
    assert (begun is None) is bool(said), "nothing was begun where something lacks"
