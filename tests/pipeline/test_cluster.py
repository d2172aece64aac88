"""The same manifest on two real nodes: real PyTorchJobs, real pods, and the same results as on one machine."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from cluster.installed import Runs
from monitoring.observed import Observed

from controller.api.meta import LABEL_RUN

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.slow, pytest.mark.pipeline]


def figures(result: dict[str, Any]) -> dict[str, float]:
    """All metrics but those that are a clock's: latency, and what is derived from it."""
    timed = ("latency/", "econds", "perSecond")
    return {name: value for name, value in result["metrics"].items() if not any(word in name for word in timed)}


def test_the_quickstart_succeeds_with_the_local_runs_results(observed: Observed, workspace: Path):
    runs = observed.runs
    status = runs.status("quickstart")
    assert status["progress"] == "12/12 (100%)"
    pods = runs.cluster.items("pods", "-n", runs.namespace, "-l", f"{LABEL_RUN}=quickstart")
    nodes = {pod["spec"]["nodeName"] for pod in pods}
    assert nodes == {"node-1", "node-2"}
    for phase in status["phases"]:
        here = json.loads((workspace / "quickstart" / phase["name"] / "result.json").read_text())
        there = runs.result("quickstart", phase["name"])
        assert figures(there) == figures(here), phase["name"]
        told = {name: value for name, value in phase["metrics"].items() if name in figures(here)}
        assert told.items() <= figures(here).items()
        if here["artifacts"].keys() & {"model", "reward-model", "traces"}:
            assert digests(there) == digests(here), phase["name"]
    report = runs.folder("quickstart") / "package/report.html"
    assert "quickstart" in report.read_text()
    jobs = runs.cluster.items("pytorchjobs", "-n", runs.namespace, "-l", f"{LABEL_RUN}=quickstart")
    assert len(jobs) == 12
    # The table that a user sees.
    columns = runs.kubectl("get", "alignmentruns", "quickstart").splitlines()
    assert columns[0].split() == ["NAME", "PHASE", "PROGRESS", "STEP", "LOSS", "TOKENS/S", "ETA", "AGE"]
    assert columns[1].split()[:4] == ["quickstart", "Succeeded", "12/12", "(100%)"]


def digests(result: dict[str, Any]) -> dict[str, str]:
    return {name: artifact["digest"] for name, artifact in result["artifacts"].items()}


def test_a_missed_gate_stops_packaging(runs: Runs):
    """The metric and the threshold are told on the run."""
    text = (ROOT / "manifests/samples/minimal.yaml").read_text()
    spec = yaml.safe_load(text)["spec"]
    del spec["workspace"]
    rows = [{"synthetic": {"task": "letters", "split": "test", "count": 20}}]
    evaluate = {
        "data": {"rows": rows}, "sampling": {"maxNewTokens": 4},
        "benchmarks": [{"name": "answers", "accuracy": {"match": "exact"}}],
        "gates": [{"metric": "sft/answers/accuracy", "atLeast": 0.99}],
    }  # fmt: skip
    spec["phases"] += [{"name": "eval", "evaluate": evaluate}, {"name": "package", "package": {}}]
    runs.apply("gated", spec)
    runs.kubectl("wait", "arun/gated", "--for=condition=Failed", "--timeout=180s", timeout=190)
    failed = next(c for c in runs.status("gated")["conditions"] if c["type"] == "Failed")
    assert failed["reason"] == "PhaseFailed"
    assert "phase eval: GateFailed: gate missed: sft/answers/accuracy is 0" in failed["message"]
    assert "must be at least 0.99" in failed["message"]
    assert runs.phase("gated", "package")["state"] == "Blocked"
    jobs = [job["metadata"]["name"] for job in runs.cluster.items("pytorchjobs", "-n", runs.namespace)]
    assert not any("package" in name for name in jobs)
