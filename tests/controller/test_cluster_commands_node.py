"""`alignctl logs` of pods that run: live, over broken connections, attempts and pods."""

import re
import subprocess
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from cluster.client import Cluster
from cluster.proxy import FaultProxy
from cluster_bench import Bench, attempt, phase

pytestmark = pytest.mark.slow
LINES = 40
PROGRAM = f"""
import sys, time
for number in range({LINES}):
    print(sys.argv[1], number, flush=True)
    time.sleep(0.1)
print("the end", end="", flush=True)
"""


@pytest.fixture
def bench(node_cluster: Cluster, capsys: pytest.CaptureFixture[str]) -> Iterator[Bench]:
    bench = Bench(node_cluster, capsys)
    bench.define_runs()
    operators = node_cluster.items("deployments", "-n", "alignment-system")
    assert not operators, "an operator would carry out the runs that are only played here: its tests come later"
    bench.run()
    yield bench
    node_cluster.delete_namespace(bench.namespace)


def talker(
    bench: Bench, attempt: int = 1, index: int = 0, image: str = "local/python:1", program: str = PROGRAM
) -> str:
    """A pod that prints, in the place of one that trains."""
    labels = {"alignment.dev/run": "helpful", "alignment.dev/phase": "base", "alignment.dev/attempt": str(attempt)}
    labels["training.kubeflow.org/replica-index"] = str(index)
    name = f"helpful-base-{attempt}-worker-{index}"
    command = ["python3", "-c", program, f"attempt {attempt} pod {index}:"]
    container = {"name": "pytorch", "image": image, "imagePullPolicy": "Never", "command": command}
    spec = {"restartPolicy": "Never", "terminationGracePeriodSeconds": 0, "containers": [container]}
    pod: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": labels, "ownerReferences": [bench.job(f"helpful-base-{attempt}")]},
        "spec": spec,
    }
    bench.cluster.apply(pod, bench.namespace)
    return name


def until(process: subprocess.Popen[str], text: str) -> str:
    """What is printed up to and with the line that has ``text``, within two minutes."""
    assert process.stdout
    output = ""
    late = threading.Timer(120, process.kill)
    late.start()
    try:
        while text not in output:
            line = process.stdout.readline()
            assert line, f"ended with {process.wait()} after: {output}"
            output += line
    finally:
        late.cancel()
    return output


def numbers(output: str, attempt: int) -> list[int]:
    return [int(number) for number in re.findall(rf"^attempt {attempt} pod 0: (\d+)$", output, re.M)]


def test_a_log_is_followed_live_over_broken_connections_and_attempts(bench: Bench) -> None:
    bench.write(phase("base", "Running", attempt()), phase="base")
    with FaultProxy(bench.kubeconfig) as proxy:
        bench.kubeconfig = proxy.kubeconfig
        process = bench.start("logs", "base", "--follow")
        output = until(process, "its pods have not been made yet")
        name = talker(bench)
        output += until(process, "pod 0: 5")
        assert bench.cluster.get("pod", name, "-n", bench.namespace)["status"]["phase"] == "Running"
        proxy.break_streams()
        output += until(process, "cannot be read on")
        failed = attempt(1, "Failed", failure="Infrastructure", message="lost")
        bench.write(phase("base", "Running", failed, attempt(2)), phase="base")
        talker(bench, 2)
        output += until(process, "attempt 2 pod 0: 5")
        away = proxy.break_everything()
        output += until(process, "trying again")
        proxy.remove(away)
        bench.write(phase("base", "Succeeded", failed, attempt(2, "Succeeded")), phase="", held={"Succeeded": ""})
        rest, _ = process.communicate(timeout=60)
    output += rest
    assert process.returncode == 0
    assert [numbers(output, 1), numbers(output, 2)] == [list(range(LINES))] * 2, output
    assert "the end" in output  # what was said about the connection may follow it


def test_logs_of_pods_that_have_ended_or_cannot_start(bench: Bench) -> None:
    bench.write(phase("base", "Running", attempt()), phase="base")
    for index in (0, 1):
        talker(bench, 1, index)
    bare = talker(bench, 1, 2, image="local/missing:1")
    silent, ended = talker(bench, 1, 3, program="import time; time.sleep(3600)"), talker(bench, 1, 4, program="")
    pods = ("get", "pods", "-n", bench.namespace, "-o", "jsonpath={.items[*].status.phase}")
    bench.cluster.wait(lambda: bench.cluster.kubectl(*pods).count("Succeeded") == 3, 60, "the pods ended")
    for index in (0, 1):
        code, output = bench.call("logs", "--pod", str(index))
        assert (code, output.splitlines()[0], output.splitlines()[-1]) == (0, f"attempt 1 pod {index}: 0", "the end")
        assert len(output.splitlines()) == LINES + 1
    code, output = bench.call("logs", "--pod", "2")
    assert (code, output.startswith(f"pod {bare} does not run yet: ErrImageNeverPull local/missing:1: ")) == (1, True)
    running = ("get", "pod", silent, "-n", bench.namespace, "-o", "jsonpath={.status.phase}")
    bench.cluster.wait(lambda: bench.cluster.kubectl(*running) == "Running", 60, "one runs")
    for index, said in (
        (3, f"pod {silent} runs and has printed nothing yet"),
        (4, f"pod {ended} ended without a word"),
    ):
        code, output = bench.call("logs", "--pod", str(index))
        assert (code, output.splitlines()[0]) == (0, said), "what the others wait for may be told behind it"
