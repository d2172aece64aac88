"""The whole pipeline of the quickstart, shortened, as a user runs it."""

import json

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.pipeline]


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


def test_running_again_starts_nothing(workspace, quickstart):
    done = quickstart("run", workspace)
    assert done.returncode == 0
    assert "started" not in done.stdout


def test_an_edit_reruns_what_depends_on_it_and_nothing_else(workspace, quickstart):
    done = quickstart("plan", workspace, "--set", "spec.phases.distill.distill.temperature=2")
    assert done.returncode == 0, done.stderr
    again = {line.split()[0] for line in done.stdout.splitlines() if " run " in line}
    assert again == {"distill", "eval", "package"}
