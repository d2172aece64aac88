"""One fault at one call of a run, for every fault and every call; the operator killed and frozen at every call; watches that lie.

`make soak` runs all of it; `make test` a part that has each fault and each call.
"""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator

import pytest
from cluster.client import Cluster
from cluster.jobs import KINDS
from cluster.proxy import FaultProxy, Rule
from driver import ROOT, OperatorProcess, free_port
from ends import watched_ends
from sweep import FAULTS, Scene, calls_of, plain

WHOLE = bool(os.environ.get("SOAK"))
BUGS = 'alignment_operator_reconcile_seconds_count{outcome="bug"}'


swept = pytest.mark.parametrize("scene", KINDS if WHOLE else ["PyTorchJob"], indirect=True)
"""By the kinds of job that a test is about."""


@pytest.fixture(scope="module")
def scene(
    request: pytest.FixtureRequest, kwok_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Scene]:
    kwok_cluster.define(ROOT / "manifests/base/crd.yaml")
    for name in ("namespace", "rbac"):
        kwok_cluster.apply(ROOT / f"manifests/base/{name}.yaml")
    mine = kwok_cluster.service_account_kubeconfig("alignment-system", "alignment-operator")
    with FaultProxy(mine) as proxy, watched_ends(kwok_cluster, kind=KINDS[request.param]) as ends:
        operator = OperatorProcess(proxy.kubeconfig, free_port(), tmp_path_factory.mktemp("swept") / "log").start()
        leads(kwok_cluster, operator)
        scene = Scene(kwok_cluster, proxy, operator, ends, request.param)
        calm = f"calm-{request.param.lower()}"
        scene.begin([calm])
        scene.finish([calm], 300)
        scene.finish([calm, "none"], 2)  # the last event is told after the last write
        scene.calm = plain(scene.statuses()[calm], calm)
        scene.calls = len(proxy.seen(path=calls_of(calm)))
        assert scene.over([calm])
        yield scene
        scene.operator.stop("kill")


@pytest.fixture(autouse=True)
def healed(scene: Scene) -> Iterator[None]:
    if running(scene.operator).poll() is not None:
        scene.operator.start()
    leads(scene.cluster, scene.operator)
    yield
    scene.proxy.heal()


def leads(cluster: Cluster, operator: OperatorProcess) -> None:
    cluster.wait(lambda: operator.metric("alignment_operator_leader") == 1, 90, "it leads")


def chosen(calls: int) -> list[tuple[str, int]]:
    """All, or of each fault and of each call at least one."""
    faults = list(FAULTS)
    if WHOLE:
        return [(fault, k) for fault in faults for k in range(calls)]
    return [(faults[i % len(faults)], i % calls) for i in range(max(len(faults), calls))]


@pytest.mark.parametrize("scene", KINDS, indirect=True)
def test_each_fault_at_each_call(scene: Scene):
    cells = {f"{scene.backend.lower()}-{i}": cell for i, cell in enumerate(chosen(scene.calls))}
    rules = [FAULTS[fault](scene.proxy, calls_of(name), k) for name, (fault, k) in cells.items()]
    scene.begin(list(cells))
    scene.finish(list(cells), 420 + len(cells))
    wrong = scene.wrong({name: f"{fault} at call {k} of {name}" for name, (fault, k) in cells.items()})
    met = sum(rule.hits for rule in rules)
    print(f"{len(cells)} cells of {len(FAULTS)} faults and {scene.calls} calls: {met} met, {len(wrong)} wrong")
    assert not wrong, "\n".join(wrong)
    assert met >= 0.7 * len(cells)  # a look that finds less to do makes fewer calls
    assert scene.operator.metric(BUGS) == 0


def where(calls: int) -> range:
    return range(calls) if WHOLE else range(calls // 2, calls // 2 + 1)


@swept
@pytest.mark.parametrize("carried_out", [False, True], ids=["before", "after"])
def test_killed_at_each_call(scene: Scene, carried_out: bool):
    """kill -9 in the middle of a call that the API server has, or has not, carried out; then another one begins."""
    cells = {}
    for k in where(scene.calls):
        name = f"killed-{scene.backend.lower()}-{carried_out:d}-{k}"
        cells[name] = f"kill -9 at call {k}"
        process = running(scene.operator)
        rule = scene.proxy.interrupt(process.kill, carried_out=carried_out, path=calls_of(name), skip=k)
        scene.begin([name])
        if is_met(scene, name, rule):
            assert process.wait(10) == -signal.SIGKILL
            scene.operator.start()
        scene.finish([name], 120)
    assert not (wrong := scene.wrong(cells)), "\n".join(wrong)


@swept
def test_frozen_at_each_call(scene: Scene):
    """SIGSTOP in the middle of a call, until another replica leads; then it goes on where it was."""
    cells = {}
    pair = [scene.operator, OperatorProcess(scene.proxy.kubeconfig, free_port(), scene.operator.log.with_name("other"))]
    pair[1].start()
    try:
        scene.cluster.wait(lambda: pair[1].get("healthz")[0] == 200, 60, "the other one runs")
        leads(scene.cluster, pair[0])
        for k in where(scene.calls):
            name = f"frozen-{scene.backend.lower()}-{k}"
            cells[name] = f"frozen at call {k}"
            leader, other = sorted(pair, key=lambda one: -one.metric("alignment_operator_leader"))
            rule = scene.proxy.interrupt(frozen(leader), carried_out=True, path=calls_of(name), skip=k)
            scene.begin([name])
            if is_met(scene, name, rule):
                leads(scene.cluster, other)
                running(leader).send_signal(signal.SIGCONT)
                assert running(leader).wait(60) == 1  # for whoever has it run to start it again
                leader.start()
            scene.finish([name], 120)
    finally:
        pair[1].stop("kill")
    assert not (wrong := scene.wrong(cells)), "\n".join(wrong)


def running(operator: OperatorProcess) -> subprocess.Popen[bytes]:
    assert operator.process is not None
    return operator.process


def frozen(operator: OperatorProcess) -> Callable[[], None]:
    process = running(operator)
    return lambda: process.send_signal(signal.SIGSTOP)


def is_met(scene: Scene, name: str, rule: Rule) -> bool:
    """Whether it comes before the run's end."""
    scene.cluster.wait(lambda: rule.hits or scene.over([name]), 120, f"{name} is met")
    return bool(rule.hits)


LIES: dict[str, Callable[[FaultProxy], None]] = {
    "end": FaultProxy.break_streams,
    "expire": FaultProxy.expire_watches,
    "repeat": FaultProxy.repeat_events,
    "late": lambda proxy: proxy.delay_events(0.5),
}


@swept
@pytest.mark.parametrize("lie", LIES)
def test_watches_that_lie(scene: Scene, lie: str):
    """All of them, every second while runs go on: they end, have expired, tell things twice and out of order, or late."""
    names = [f"{lie}-{scene.backend.lower()}-{i}" for i in range(8)]
    scene.begin(names)
    scene.finish(names, 120, lambda: LIES[lie](scene.proxy))
    assert not (wrong := scene.wrong(dict.fromkeys(names, lie))), "\n".join(wrong)


@swept
def test_watches_that_are_silent_for_a_while(scene: Scene):
    names = [f"silent-{scene.backend.lower()}-{i}" for i in range(8)]
    scene.begin(names)
    scene.proxy.freeze_watches()
    scene.finish(names, 20)
    scene.proxy.thaw_watches()
    scene.finish(names, 60)
    assert not (wrong := scene.wrong(dict.fromkeys(names, "silent for 20 s"))), "\n".join(wrong)
