"""Models that are split over two real nodes: whole runs, from `kubectl apply` to their reports; and a node loses its power."""

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from cluster.installed import Runs
from kueue import quota
from test_nodes import MODEL, PHASE, POLICY, attempts, local, losses, more_than_half

from controller.backends.cluster import evidence

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

STRATEGIES = {
    "fsdp": {"strategy": "fsdp"},
    "zero-3": {"strategy": "deepspeed", "deepspeed": {"stage": 3}},
}
SAMPLING = {"maxNewTokens": 6}
LONG = PHASE | {"batchSize": 256, "duration": {"maxSteps": 120}}
"""Of many passes a step, so that there is time to disturb it, and of few steps, over which rounding adds up little."""
PASSES = {"microBatchTokens": 256}
STEPS = {"batchSize": 8, "duration": {"maxSteps": 4}, "checkpoint": {"everySteps": 2}}

Losses = dict[int, float]


def letters(split: str, count: int = 48) -> dict[str, Any]:
    return {"synthetic": {"task": "letters", "split": split, "count": count}}


def rows(split: str) -> dict[str, Any]:
    return {"train": [letters(split)], "eval": [letters(split, 8)], "maxLength": 32}


def pipeline(parallel: dict[str, Any]) -> list[dict[str, Any]]:
    """Every type of phase, all of them spread the same way."""
    sft, reward, dpo = {"phase": "sft"}, {"phase": "reward"}, {"phase": "dpo"}
    prompts = {"prompts": [letters("prompts", 16)], "maxPromptLength": 16}
    specs: dict[str, tuple[str, dict[str, Any]]] = {
        "sft": ("sft", {"data": rows("demonstrations"), **STEPS}),
        "reward": ("reward", {"model": sft, "data": rows("preferences"), **STEPS}),
        "dpo": ("dpo", {"policy": sft, "data": rows("preferences"), **STEPS}),
        "ppo": (
            "ppo",
            {"policy": sft, "rewardModel": reward, "data": prompts, "iterations": 2, "batchSize": 8, "sampling": SAMPLING},
        ),
        "traces": ("rollout", {"policy": dpo, "rewardModel": reward, "data": prompts, "sampling": SAMPLING}),
        "distill": (
            "distill",
            {
                "teacher": dpo, "student": {"teacherLayers": [1]}, "traces": {"phase": "traces"}, "prompts": prompts,
                "rewardModel": reward, "sampling": SAMPLING, "maxLength": 32, **STEPS,
            },
        ),
        "eval": (
            "evaluate",
            {
                "rewardModel": reward, "data": {"rows": [letters("test", 8)]}, "sampling": SAMPLING,
                "benchmarks": [{"name": "reward", "reward": {}}, {"name": "length", "length": {}}],
                "latency": {"enabled": False},
            },
        ),
    }  # fmt: skip
    spread = [{"name": name, kind: spec | {"parallel": parallel}} for name, (kind, spec) in specs.items()]
    return [*spread, {"name": "package", "package": {}}]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_whole_run_on_two_nodes(runs: Runs, strategy: str):
    cpu = more_than_half(runs)
    runs.cluster.apply(
        quota(runs.namespace, f"{2 * int(cpu[:-1])}m")
    )  # of one phase, or two would get half of their pods each
    spec = {"model": MODEL, "failurePolicy": POLICY, "queueName": "alignment", "phases": pipeline(STRATEGIES[strategy])}
    runs.apply(strategy, spec, nodes=2, procsPerNode=1, resources={"requests": {"cpu": cpu}})
    status = runs.until_succeeded(strategy, 1200)
    attempts = {phase["name"]: len(phase["attempts"]) for phase in status["phases"]}
    assert attempts == dict.fromkeys(attempts, 1), "every phase went through at the first attempt"
    for job in runs.cluster.items("pytorchjobs", "-n", runs.namespace):
        name = job["metadata"]["name"]
        nodes = {runs.pod(name, index)["spec"]["nodeName"] for index in (0, 1)}
        assert nodes == {"node-1", "node-2"}, name
    assert (runs.folder(strategy) / "package" / "report.html").stat().st_size > 10_000


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Losses:
    """Of the long phase in one process on this machine."""
    folder = tmp_path_factory.mktemp("undisturbed")
    local(folder, {"model": MODEL, "phases": [{"name": "sft", "sft": LONG}]})
    return losses(folder / "runs/local/sft")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_node_loses_power_and_the_other_goes_on_alone(runs: Runs, strategy: str, undisturbed: Losses):
    phase = LONG | {"parallel": PASSES | STRATEGIES[strategy]}
    policy = {**POLICY, "nodeLostSeconds": 2, "startupTimeoutSeconds": 120}
    spec = {"model": MODEL, "failurePolicy": policy, "phases": [{"name": "sft", "sft": phase}]}
    cpu = {"requests": {"cpu": more_than_half(runs)}}
    runs.apply("cut", spec, nodes=2, minNodes=1, graceSeconds=5, resources=cpu)
    saved = runs.until_checkpoint("cut", "sft", 10, timeout=600)
    places = {runs.pod("cut-sft-1", index)["spec"]["nodeName"]: index for index in (0, 1)}
    cut = time.time()
    runs.cluster.kill_node("node-2")
    try:
        end = runs.wait("the other pod ends", lambda: ended(runs, "cut-sft-1", places["node-1"]))
        word = json.loads(end["message"])
        assert (word["failure"], word["lostNode"]) == ("Infrastructure", places["node-2"])
        assert datetime.fromisoformat(end["finishedAt"]).timestamp() - cut < 30
        runs.until_succeeded("cut", 900)
        assert attempts(runs, "cut") == [
            ("Failed", "Infrastructure"),
            ("Failed", "StartupTimeout"),
            ("Succeeded", None),
        ]
        lost, waited, alone = runs.phase("cut", "sft")["attempts"]
        assert (lost["node"], lost["nodes"], waited["nodes"], alone["nodes"]) == ("node-2", 2, 2, 1)
    finally:
        runs.cluster.start_node("node-2")
        runs.cluster.kubectl("wait", "node/node-2", "--for=condition=Ready", "--timeout=90s", timeout=100)
    check(runs.folder("cut") / "sft", undisturbed, saved)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_one_node_has_room_at_first_and_later_both(runs: Runs, strategy: str, undisturbed: Losses):
    phase = LONG | {"parallel": PASSES | STRATEGIES[strategy]}
    policy = {**POLICY, "startupTimeoutSeconds": 30}
    spec = {"model": MODEL, "failurePolicy": policy, "phases": [{"name": "sft", "sft": phase}]}
    runs.cluster.kubectl("cordon", "node-2")
    try:
        cpu = {"requests": {"cpu": more_than_half(runs)}}
        runs.apply("size", spec, nodes=2, minNodes=1, graceSeconds=60, resources=cpu)
        saved = runs.until_checkpoint("size", "sft", 10, timeout=600)
        assert [a["nodes"] for a in runs.phase("size", "sft")["attempts"]] == [2, 1]
        assert runs.phase("size", "sft")["message"] == "on 1 of 2 nodes"
        runs.kubectl("patch", "arun", "size", "--type=merge", "-p", '{"spec":{"suspend":true}}')
        runs.wait("its pods are gone", lambda: not runs.cluster.items("pods", "-n", runs.namespace))
    finally:
        runs.cluster.kubectl("uncordon", "node-2")
    runs.kubectl("patch", "arun", "size", "--type=merge", "-p", '{"spec":{"suspend":false}}')
    runs.until_succeeded("size", 900)
    ends = [(a["nodes"], a["state"]) for a in runs.phase("size", "sft")["attempts"]]
    assert ends == [(2, "Stopped"), (1, "Stopped"), (2, "Succeeded")]
    assert {runs.pod("size-sft-3", index)["spec"]["nodeName"] for index in (0, 1)} == {"node-1", "node-2"}
    check(runs.folder("size") / "sft", undisturbed, saved)


def check(phase: Path, undisturbed: Losses, saved: int) -> None:
    ours = losses(phase)
    assert list(ours) == list(undisturbed) == list(range(1, 121)), "no step is missing or made twice"
    assert ours == pytest.approx(undisturbed, rel=1e-4), f"the same rows, before and after step {saved}"


def ended(runs: Runs, job: str, index: int) -> dict[str, Any]:
    return evidence.container_state(runs.pod(job, index), "terminated")
