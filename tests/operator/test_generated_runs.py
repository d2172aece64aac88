"""Generated AlignmentRuns through the real API server, to an operator that looks at every one that it takes.

`make soak` sends ten thousand, `make test` a few; SEED=N others.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from http.client import HTTPSConnection
from typing import Any

from cluster.kube_http import call, connect
from driver import Driver, OperatorProcess
from generated import Generator

Object = dict[str, Any]

MANY, BATCH = (10_000, 200) if os.environ.get("SOAK") else (60, 60)
SEED = int(os.environ.get("SEED", "1"))
RUNS = "/apis/alignment.dev/v1alpha1/namespaces/{}/alignmentruns"
BUGS = 'alignment_operator_reconcile_seconds_count{outcome="bug"}'
MAKES_JOBS = 10
"""Of so many one is not suspended, and its jobs are made."""
REFUSALS = (400, 422)


def batches() -> Iterator[list[Object]]:
    generator = Generator(SEED)
    for first in range(0, MANY, BATCH):
        runs = [generator.run(f"generated-{number}") for number in range(first, min(first + BATCH, MANY))]
        for run in runs[MAKES_JOBS // 2 :: MAKES_JOBS]:
            run["goes"] = True
        for run in runs:
            if not run.pop("goes", False):
                run["spec"]["suspend"] = True
        yield runs


def test_generated_runs_are_refused_or_looked_at_and_never_a_bug(driver: Driver, operator: OperatorProcess):
    bugs, told = operator.metric(BUGS), Counter[str]()
    for runs in batches():
        connection = connect(driver.cluster)
        taken = {run["metadata"]["name"]: run for run in runs if _sent(connection, driver.namespace, run, told)}
        driver.cluster.wait(lambda taken=taken: _looked_at(driver, taken, told), 300, "all are looked at", every=1.0)
        call(connect(driver.cluster), "DELETE", RUNS.format(driver.namespace), {})
        driver.cluster.wait(lambda: not driver.server.items(RUNS.format(driver.namespace)), 120, "they are deleted")
        assert operator.metric(BUGS) == bugs, f"seed {SEED}, runs {list(taken)}: see {operator.log}"
    print(f"seed {SEED}: {dict(told)}")
    assert min(told["refused by the API server"], told["accepted"], told["refused by the operator"]) >= max(
        1, MANY // 100
    )


def _sent(connection: HTTPSConnection, namespace: str, run: Object, told: Counter[str]) -> bool:
    """Whether the API server takes it. What it refuses, it refuses for what is in it."""
    connection.request("POST", RUNS.format(namespace), json.dumps(run), {"Content-Type": "application/json"})
    answer = connection.getresponse()
    said = json.loads(answer.read())
    if answer.status == 201:
        return True
    assert answer.status in REFUSALS, f"{said.get('message')}: {json.dumps(run)}"
    told["refused by the API server"] += 1
    return False


def _looked_at(driver: Driver, taken: dict[str, Object], told: Counter[str]) -> bool:
    """Each is accepted, or told what is wrong with it in lines that name the field."""
    found = {run["metadata"]["name"]: _accepted(run) for run in driver.server.items(RUNS.format(driver.namespace))}
    if any(not found[name] for name in taken):
        return False
    for name, run in taken.items():
        accepted, message = found[name]["status"] == "True", found[name].get("message", "")
        told["accepted" if accepted else "refused by the operator"] += 1
        assert accepted or ("spec" in message and message.isprintable()), f"{message!r}: {json.dumps(run)}"
    return True


def _accepted(run: Object) -> Object:
    conditions = run.get("status", {}).get("conditions", ())
    return next((c for c in conditions if c["type"] == "Accepted"), {})
