"""The whole pipeline of the quickstart, shortened, as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = [str(Path(sys.executable).parent / "alignctl"), "run", str(ROOT / "configs/quickstart.yaml")]
SHORT = ["-f", str(Path(__file__).with_name("short.yaml"))]

pytestmark = pytest.mark.slow


def run(workspace: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*RUN, *SHORT, "--workspace", str(workspace), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=os.environ, check=False)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("a workspace")
    done = run(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "right answers" in done.stdout
    assert "report.html" in done.stdout
    return folder


def test_every_phase_left_its_result_and_artifact(workspace):
    results = {path.parent.name: json.loads(path.read_text()) for path in workspace.glob("quickstart/*/result.json")}
    assert len(results) == 12
    for name, result in results.items():
        for artifact in result["artifacts"].values():
            assert (workspace / "quickstart" / name / artifact["path"]).exists()


def test_the_student_has_at_most_a_third_of_the_teachers_parameters(workspace):
    result = json.loads((workspace / "quickstart/distill/result.json").read_text())
    assert result["metrics"]["parameters"] * 3 <= result["metrics"]["teacherParameters"]


def test_every_model_has_every_headline_figure(workspace):
    results = json.loads((workspace / "quickstart/eval/results.json").read_text())
    headline = [metric["key"] for metric in results["metrics"] if metric["headline"] and "winRate" not in metric["key"]]
    assert len(headline) >= 5
    for model in results["models"]:
        assert all(key in results["values"][model] for key in headline), model


def test_running_again_starts_nothing(workspace):
    done = run(workspace)
    assert done.returncode == 0
    assert "started" not in done.stdout


def test_an_edit_reruns_what_depends_on_it_and_nothing_else(workspace):
    plan = [RUN[0], "plan", RUN[2], *SHORT, "--workspace", str(workspace)]
    edit = ["--set", "spec.phases.distill.distill.temperature=2"]
    done = subprocess.run([*plan, *edit], capture_output=True, text=True, check=True)
    again = {line.split()[0] for line in done.stdout.splitlines() if " run " in line}
    assert again == {"distill", "eval", "package"}
