"""Many runs at once: everything is done once, and the API server is asked no more than it has to be."""

import os
from pathlib import Path

import pytest
from cluster.client import Cluster
from crowds import add_ended, kopf_started, spent, started, successions, train, trainers, wait_in_a_queue
from driver import ROOT, Driver, OperatorProcess, free_port
from scale import run_many, scripted
from sweep import give_claims

from controller.operator.in_line import WORDS_PER_SECOND

RUNS = int(os.environ.get("RUNS", "30"))
PHASES = int(os.environ.get("PHASES", "2"))
ENDED = int(os.environ.get("ENDED", "40"))
TRAINING = int(os.environ.get("TRAINING", "10"))
QUEUED = int(os.environ.get("QUEUED", "10"))
RATES = tuple(float(rate) for rate in os.environ.get("RATES", "2").replace(",", " ").split())
"""Ends a second."""
SECONDS = 60 if "ENDED" in os.environ else 20


@pytest.fixture(scope="module")
def fake(kwok_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory):
    kwok_cluster.define(ROOT / "manifests/base/crd.yaml")
    for name in ("namespace", "rbac"):
        kwok_cluster.apply(ROOT / f"manifests/base/{name}.yaml")
    mine = kwok_cluster.service_account_kubeconfig("alignment-system", "alignment-operator")
    operator = OperatorProcess(mine, free_port(), tmp_path_factory.mktemp("operator") / "log").start()
    kwok_cluster.wait(lambda: operator.metric("alignment_operator_leader") == 1, 90, "it leads")
    yield operator
    operator.stop()


@pytest.fixture
def namespace(kwok_cluster: Cluster, fake: OperatorProcess) -> str:
    name = kwok_cluster.namespace("many")
    give_claims(kwok_cluster, [name])
    return name


@pytest.mark.slow
def test_runs_that_have_ended_cost_nothing(
    kwok_cluster: Cluster, fake: OperatorProcess, namespace: str, tmp_path: Path
):
    kwok_cluster.apply(scripted("model"), namespace)
    Driver(kwok_cluster, namespace).until_condition("model", "Succeeded", timeout=60)
    add_ended(kwok_cluster, namespace, kwok_cluster.get("arun", "model", "-n", namespace), ENDED)
    seconds, cpu = started(kwok_cluster, fake, namespace, ENDED)
    rest = spent(fake, SECONDS)
    print(
        f"{ENDED} runs that have ended: looked at {seconds:.1f} s after the operator's start ({cpu:.1f} CPU-s); at rest {rest}"
    )
    if "ENDED" in os.environ:
        seconds, cpu, megabytes = kopf_started(kwok_cluster, fake, ENDED, tmp_path / "bare")
        print(
            f"a kopf that does nothing is told of them {seconds:.1f} s after its start ({cpu:.1f} CPU-s, {megabytes:.0f} MB)"
        )
    assert rest.status_writes == 0
    # Once a minute the versions of all there is are compared with what the watches have told, 500 at a time.
    assert rest.reads <= 2 * (ENDED // 500 + 4)


@pytest.mark.slow
def test_many_runs_at_once(kwok_cluster: Cluster, fake: OperatorProcess, namespace: str, tmp_path: Path):
    """Beside those that have ended."""
    notes = tmp_path / "bare" if "RUNS" in os.environ else None
    figures = run_many(kwok_cluster, fake, namespace, RUNS, PHASES, 60 + 3 * RUNS * PHASES, notes)
    print(figures)
    assert figures.jobs == PHASES * RUNS
    # A start with the end before it, that it is seen running, and what the pods wait for meanwhile.
    assert figures.status_writes < 7
    # Jobs and pods at a run's first start; conflicts, and the watchdog's.
    assert figures.reads < 3
    assert fake.metric('alignment_operator_reconcile_seconds_count{outcome="bug"}') == 0
    driver = Driver(kwok_cluster, namespace)
    assert all(len(p["attempts"]) == 1 for i in range(RUNS) for p in driver.status(f"run-{i}")["phases"])


@pytest.mark.slow
def test_runs_that_train(kwok_cluster: Cluster, fake: OperatorProcess, namespace: str, tmp_path: Path):
    """Beside those that wait in a queue for their turn: as many as a cluster has no room for."""
    waited = wait_in_a_queue(kwok_cluster, fake, namespace, QUEUED)
    print(f"{QUEUED} runs wait in a queue {waited:.0f} s after the first of them was applied")
    with trainers():
        train(kwok_cluster, fake, namespace, TRAINING)
        driver = Driver(kwok_cluster, namespace)
        for i in range(min(TRAINING, 10)):
            kwok_cluster.wait(lambda i=i: "/100000" in driver.status(f"train-{i}").get("step", ""), 300, "it tells")
        going = spent(fake, SECONDS)
        each = 1000 * going.cpu_seconds / TRAINING
        print(f"{TRAINING} runs that train and {QUEUED} that wait: {going}, {each:.1f} ms of CPU a training run")
        notes = tmp_path / "bare" if "TRAINING" in os.environ else None
        for rate in RATES:
            followed = successions(kwok_cluster, fake, namespace, rate, min(SECONDS, TRAINING / 4 / rate), notes)
            print(f"{TRAINING} runs that train, {followed}")
    # Their progress, every 15 seconds; some have only begun.
    assert 0 < going.status_writes <= TRAINING * (SECONDS // 15 + 2)
    words = min(QUEUED * (SECONDS // 15 + 2), (SECONDS + 15) * WORDS_PER_SECOND)
    assert going.reads <= TRAINING + words + 2 * (ENDED // 500 + 4)


@pytest.mark.slow
def test_failures_of_every_kind_at_once(kwok_cluster: Cluster, fake: OperatorProcess, namespace: str):
    """The first attempt of each run ends otherwise; all come to their end."""
    kinds = {
        "oom": {"TEST_POD_OUTCOME_1": "fail", "TEST_POD_REASON_1": "OOMKilled", "TEST_POD_EXIT_CODE_1": "137"},
        "evicted": {"TEST_POD_OUTCOME_1": "evict"},
        "crash": {"TEST_POD_OUTCOME_1": "fail", "TEST_POD_EXIT_CODE_1": "139"},
    }
    for name, script in kinds.items():
        run = scripted(name)
        first = run["spec"]["phases"][0]["template"]["env"]
        first += [{"name": key, "value": value} for key, value in script.items()]
        kwok_cluster.apply(run, namespace)
    driver = Driver(kwok_cluster, namespace)
    driver.until_condition("oom", "Succeeded", timeout=60)
    driver.until_condition("evicted", "Succeeded", timeout=60)
    driver.until_condition("crash", "Failed", timeout=60)
    assert [a.get("failure") for a in driver.phase("oom", "sft")["attempts"]] == ["OutOfMemory", None]
    assert [a.get("failure") for a in driver.phase("evicted", "sft")["attempts"]] == ["Interrupted", None]
    assert driver.phase("crash", "sft")["message"] == "crashed with SIGSEGV"
