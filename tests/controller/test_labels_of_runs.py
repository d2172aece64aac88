"""What a run's own labels, and those of its pods, may say of what is made for it: nothing by which anybody knows whose it is."""

from collections.abc import Iterator
from typing import Any

import pytest
from builders import START, make_run, seen, sft

from controller.api.run import AlignmentRun
from controller.api.workspace import Workspace
from controller.backends.cluster import kinds
from controller.backends.cluster.kind import Owner
from controller.backends.cluster.network import policy
from controller.backends.cluster.settings import Settings
from controller.operator.defaults import Defaults
from controller.plan.check import check_run
from controller.plan.decide import Apply, decide

Object = dict[str, Any]

OURS = (
    "alignment.dev/run", "alignment.dev/phase", "alignment.dev/attempt", "alignment.dev/anything",
    "app.kubernetes.io/name", "app.kubernetes.io/part-of", "app.kubernetes.io/component", "app.kubernetes.io/managed-by",
)  # fmt: skip
"""As docs/operations.md has them, and whatever else begins as they do."""
OTHERS = (
    "kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/pod-group-name", "training.kubeflow.org/job-name",
    "trainer.kubeflow.org/trainjob-ancestor-step", "jobset.sigs.k8s.io/jobset-name", "batch.kubernetes.io/job-name",
    "job-name", "controller-uid",
)  # fmt: skip
BACKENDS = ("PyTorchJob", "TrainJob")
WORK = Defaults(workspace=Workspace(claim_name="work"))
SETTINGS = Settings("trainer:1")


def run_of(backend: str, labels: Object, **spec: Any) -> AlignmentRun:
    run = make_run(sft("base"), backend=backend, **spec)
    found = run.metadata.model_copy(update={"uid": "12345678-u", "namespace": "ns", "labels": labels})
    return WORK.applied(run.model_copy(update={"metadata": found}))


def made_for(run: AlignmentRun) -> list[Object]:
    """Its NetworkPolicy, its job, and what that refers to."""
    [action] = [a for a in decide(run, seen(), START).actions if isinstance(a, Apply)]
    kind, owner = kinds.of_run(run), Owner("ns", run.name, "12345678-u", "ns.test")
    runtime = kind.runtime(action.job, owner, SETTINGS)
    return [policy(run, []), kind.render(action.job, owner, SETTINGS), *([runtime] if runtime else [])]


def labels_in(thing: Any) -> Iterator[Object]:
    """Of every object in it, and those by which it selects."""
    if isinstance(thing, dict):
        yield from (thing[key] for key in ("labels", "matchLabels") if key in thing)
        thing = list(thing.values())
    for item in thing if isinstance(thing, list) else ():
        yield from labels_in(item)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_runs_labels_make_nothing_of_it_another_runs(backend: str):
    spread = {"topologySpreadConstraints": [{"topologyKey": "zone", "maxSkew": 1}]}
    plain, hostile = (
        [*labels_in(made_for(run_of(backend, labels, template=spread, queueName="other")))]
        for labels in ({"team": "a"}, {"team": "a", **dict.fromkeys((*OURS, *OTHERS), "other")})
    )
    assert hostile == plain
    assert len(plain) >= 5
    owned = [labels for labels in plain if "team" in labels]
    assert {labels["alignment.dev/run"] for labels in owned} == {"test"}
    assert {labels["app.kubernetes.io/part-of"] for labels in owned} == {"test"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("key", [*OURS, *OTHERS])
def test_pods_are_given_none_of_them(backend: str, key: str):
    template = {"labels": {key: "other"}}
    try:
        problems = check_run(run_of(backend, {}, template=template))
    except ValueError as error:
        problems = [error]
    assert problems
