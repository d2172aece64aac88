"""From an older version, its chart and its images, to this one and back, with runs in their middle; images of both versions.

What trains is stopped (SIGSTOP) as long as versions change, so that it is in its middle whatever the machine's speed.
"""

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from cluster import product
from cluster.assets import locate
from cluster.client import Cluster
from cluster.installed import ONE_THREAD, Runs, place_for_runs
from cluster.jobs import KINDS

from chart.before import Before, checked_out
from chart.helm import CHART, Object
from chart.release import Release, package, values
from trainers.contract import RUN_UID_VARIABLE

pytestmark = [pytest.mark.node, pytest.mark.slow, pytest.mark.soak]

ROWS = [{"synthetic": {"task": "letters", "split": "demonstrations", "count": 64}}]
PAIRS = [{"synthetic": {"task": "letters", "split": "preferences", "count": 32}}]
SCRATCH = {"hiddenSize": 16, "numLayers": 1, "tokenizer": {"kind": "word", "vocabSize": 128, "trainOn": ROWS}}
PHASES = ("first", "middle", "last", "end")
BEFORE, NOW = "before", product.TRAINER.partition(":")[2]
"""Tags of the two versions' images."""
_MARK = re.compile(r"-x[a-z2-7]{12}$")
"""Of jobs whose names could be another run's as well."""


def phases(steps: int) -> list[Object]:
    """The last ones read what the ones before have left, models, results and origins."""
    data = {"train": ROWS, "maxLength": 32, "packing": False}
    middle = {"model": {"phase": "first"}, "data": data, "duration": {"maxSteps": steps}}
    return [
        {"name": "first", "sft": {"data": data, "duration": {"maxSteps": 2}}},
        {"name": "middle", "sft": {**middle, "checkpoint": {"everySeconds": 1}}},
        {"name": "last", "dpo": {"policy": {"phase": "middle"}, "data": {"train": PAIRS}, "duration": {"maxSteps": 2}}},
        {"name": "end", "package": {}},
    ]


@dataclass
class Place:
    runs: Runs
    cluster: Cluster = field(init=False)

    def __post_init__(self) -> None:
        self.cluster = self.runs.cluster

    def apply(self, name: str, backend: str, steps: int = 5, image: str = "") -> None:
        """With the operator's default image, unless one is given."""
        template: Object = {"claims": product.TEMPLATE["claims"], "env": ONE_THREAD}
        template |= {"image": f"alignment-trainer:{image}"} if image else {}
        document = {
            "apiVersion": "alignment.dev/v1alpha1", "kind": "AlignmentRun", "metadata": {"name": name},
            "spec": {
                "workspace": {"claimName": product.WORKSPACE_CLAIM}, "backend": backend, "model": {"scratch": SCRATCH},
                "template": template, "phases": phases(steps),
            },
        }  # fmt: skip
        self.cluster.apply(document, self.runs.namespace)

    def jobs(self, name: str) -> dict[str, str]:
        """UIDs by name, in the order of their creation."""
        label = ("-n", self.runs.namespace, "-l", f"alignment.dev/run={name}")
        found = [job for kind in KINDS.values() for job in self.cluster.items(kind.plural, *label)]
        found.sort(key=lambda job: job["metadata"]["creationTimestamp"])
        return {job["metadata"]["name"]: job["metadata"]["uid"] for job in found}

    def images(self, name: str) -> dict[str, str]:
        """Tag of the trainers' image, by phase."""
        label = ("-n", self.runs.namespace, "-l", f"alignment.dev/run={name}")
        return {
            pod["metadata"]["labels"]["alignment.dev/phase"]: pod["spec"]["containers"][0]["image"].partition(":")[2]
            for pod in self.cluster.items("pods", *label)
        }

    @contextmanager
    def in_the_middle(self, names: list[str]) -> Iterator[None]:
        """Each of these runs has finished one phase and is training in the next, and does not get on meanwhile."""
        stopped: dict[str, list[psutil.Process]] = {}

        def stop() -> bool:
            for name in names:
                if name not in stopped and self.runs.checkpoints(name, "middle"):
                    stopped[name] = self._trainers(name)
                    for process in stopped[name]:
                        process.send_signal(signal.SIGSTOP)
            return len(stopped) == len(names)

        self.runs.wait("all are in their middle", stop, 300)
        assert all(stopped.values())
        assert [self.runs.phase(name, "middle")["state"] for name in names] == ["Running"] * len(names)
        try:
            yield
        finally:
            for process in [process for several in stopped.values() for process in several]:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGCONT)

    def _trainers(self, name: str) -> list[psutil.Process]:
        uid = self.cluster.get("arun", name, "-n", self.runs.namespace)["metadata"]["uid"]
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                found += [process] if process.environ().get(RUN_UID_VARIABLE) == uid else []
        return found

    def until_done(self, name: str) -> None:
        """Every phase in one attempt."""
        status = self.runs.until_succeeded(name, 600)
        assert [(p["name"], [a["state"] for a in p["attempts"]]) for p in status["phases"]] == [
            (phase, ["Succeeded"]) for phase in PHASES
        ]
        assert [_MARK.sub("", job) for job in self.jobs(name)] == [f"{name}-{phase}-1" for phase in PHASES]


@pytest.fixture
def before(tmp_path: Path) -> Before:
    return checked_out(tmp_path)


@pytest.fixture
def place(fresh_cluster: Cluster, before: Before) -> Iterator[Place]:
    before.load(fresh_cluster, locate())
    with place_for_runs(fresh_cluster) as runs:
        yield Place(runs)


def of_version(namespace: str, tag: str) -> Any:
    chosen = values(namespace)
    chosen["image"]["tag"] = chosen["defaults"]["trainerImage"]["tag"] = tag
    return {**chosen, "monitoring": {}}


def until_another_acts(release: Release, first: str) -> None:
    release.cluster.wait(lambda: release.holder() not in ("", first), 120, "another replica acts")


def test_runs_in_their_middle_outlive_an_upgrade_and_the_way_back(place: Place, before: Before, tmp_path: Path):
    cluster, runs = place.cluster, place.runs
    release = Release(cluster, cluster.namespace("system"), tmp_path)
    release.helm("install", str(package(before.chart, tmp_path)), values=of_version(runs.namespace, BEFORE))

    # ---- up: what trains goes on where it is, what has finished stays, what comes is of the new version
    up = [f"up-{kind.lower()}" for kind in KINDS]
    for name, kind in zip(up, KINDS, strict=True):
        place.apply(name, kind, steps=1000)
    place.apply("new-trainer", "PyTorchJob", image=NOW)
    with place.in_the_middle(up):
        place.until_done("new-trainer")
        begun, first = {name: place.jobs(name) for name in up}, release.holder()
        release.helm("upgrade", str(package(CHART, tmp_path)), values=of_version(runs.namespace, NOW))
        until_another_acts(release, first)
        assert {name: place.jobs(name) for name in up} == begun
    for name in up:
        place.until_done(name)
        assert begun[name].items() <= place.jobs(name).items(), "the attempt that trained has finished"
        assert place.images(name) == {"first": BEFORE, "middle": BEFORE, "last": NOW, "end": NOW}
    place.apply("old-trainer", "TrainJob", image=BEFORE)

    # ---- back: the same
    back = [f"back-{kind.lower()}" for kind in KINDS]
    for name, kind in zip(back, KINDS, strict=True):
        place.apply(name, kind, steps=1000)
    known = {name: {**runs.status(name), "conditions": []} for name in up}
    with place.in_the_middle(back):
        place.until_done("old-trainer")
        begun, first = {name: place.jobs(name) for name in back}, release.holder()
        release.helm("rollback", "1")
        until_another_acts(release, first)
        assert {name: place.jobs(name) for name in back} == begun
    for name in back:
        place.until_done(name)
        assert begun[name].items() <= place.jobs(name).items(), "the attempt that trained has finished"
        assert place.images(name) == {"first": NOW, "middle": NOW, "last": BEFORE, "end": BEFORE}
    for name in up:
        assert [len(phase["attempts"]) for phase in runs.status(name)["phases"]] == [1] * len(PHASES)
        assert {p["name"]: p["artifactDigest"] for p in runs.status(name)["phases"]} == {
            p["name"]: p["artifactDigest"] for p in known[name]["phases"]
        }
