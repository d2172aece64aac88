"""What no pod can be is told when a run is validated and as soon as it is applied; and nothing that a pod can be is refused."""

import json
from pathlib import Path

import pytest
from builders import START, document, job, make_run, seen, sft, with_status
from pod_templates import REFUSED, TAKEN, UNREADABLE

from controller.api import meta
from controller.api.problems import InvalidRun
from controller.api.syntax import ANNOTATION, IMAGE, QUALIFIED, RESOURCE, SUBDOMAIN, VALUE
from controller.api.workspace import Workspace
from controller.operator.defaults import Defaults
from controller.plan.check import check_run
from controller.plan.decide import Apply, decide
from controller.plan.foreign import LONGEST, PROFILE
from controller.plan.observed import JobState
from controller.plan.pods import ANNOTATIONS_LIMIT, VARIABLE_LIMIT
from controller.preflight import load_run

ANSWERS = Path(__file__).parent / "syntax/answers.jsonl"
"""What Kubernetes' own functions say (`syntax/main.go`, of k8s.io/apimachinery v0.37.1 and distribution/reference v0.6.0)."""
RULES = {"subdomain": SUBDOMAIN, "qualified": QUALIFIED, "annotation": ANNOTATION, "value": VALUE, "image": IMAGE}


WORK = Defaults(workspace=Workspace(claim_name="work"))


def test_names_are_what_kubernetes_takes_for_them() -> None:
    answers = [json.loads(line) for line in ANSWERS.read_text().splitlines()]
    assert len(answers) > 300
    for text, said in answers:
        assert {rule: RULES[rule].fits(text) for rule in said} == said, text


@pytest.mark.parametrize(
    ("name", "fits"),
    [
        *(
            (n, True)
            for n in ("cpu", "memory", "ephemeral-storage", "hugepages-2Mi", "nvidia.com/gpu", "x.kubernetes.io/y")
        ),
        *((n, False) for n in ("bad name!!", "gpu", "requests.nvidia.com/gpu", "a/b/c", "", "/gpu", f"{'a' * 246}/x")),
    ],
)
def test_resources_are_those_of_containers(name: str, fits: bool) -> None:
    """As `validateContainerResourceName` of Kubernetes has it."""
    assert RESOURCE.fits(name) == fits


CLAIM = {"claimName": "c", "mountPath": "/data"}
IMPOSSIBLE = {
    "sub path": ({"claims": [CLAIM | {"subPath": "../../x"}]}, 'claims[0].subPath: "../../x" is not a folder in the claim'),
    "absolute": ({"claims": [CLAIM | {"subPath": "/etc"}]}, 'claims[0].subPath: "/etc" is not a folder in the claim'),
    "claim": ({"claims": [CLAIM | {"claimName": "a..b"}]}, 'claims[0].claimName: "a..b" is not a name'),
    "account": ({"serviceAccountName": "Bad_Name"}, 'serviceAccountName: "Bad_Name" is not a name'),
    "priority": ({"priorityClassName": "x" * 300}, "priorityClassName: "),
    "runtime": ({"runtimeClassName": "a.-b"}, 'runtimeClassName: "a.-b" is not a name'),
    "selector": ({"nodeSelector": {"bad key!": "x"}}, 'nodeSelector: "bad key!" is not a key'),
    "selected": ({"nodeSelector": {"a": "b c"}}, 'nodeSelector[a]: "b c" is not a label\'s value'),
    "resource": ({"resources": {"limits": {"bad name!!": 1}}}, 'resources.limits: "bad name!!" is not a resource'),
    "Job's label": ({"labels": {"job-name": "x"}}, 'labels: "job-name" is how another controller knows its pods'),
    "JobSet's label": ({"labels": {"jobset.sigs.k8s.io/jobset-uid": "x"}}, "labels: "),
    "Trainer's label": ({"labels": {"trainer.kubeflow.org/trainjob-ancestor-step": "x"}}, "labels: "),
    "Kueue's label": ({"labels": {"kueue.x-k8s.io/pod-group-name": "x"}}, "labels: "),
    "Job's annotation": ({"annotations": {"batch.kubernetes.io/job-completion-index": "7"}}, "annotations["),
    "seconds of more bits": (
        {"tolerations": [{"key": "a", "effect": "NoExecute", "tolerationSeconds": 2**63}]}, "is more than 64 bits hold"
    ),
    "unseen": ({"image": "nothing:1\u202e\x07"}, 'image: "nothing:1\\u202e\\x07" is not an image'),
    "server": ({"server": {"image": "a//b"}}, 'server.image: "a//b" is not an image'),
    "secret": ({"secretRefs": ["a..b"]}, 'secretRefs[0]: "a..b" is not a name'),
    "pull secret": ({"imagePullSecrets": ["a.-b"]}, 'imagePullSecrets[0]: "a.-b" is not a name'),
    "taint": ({"tolerations": [{"key": "a b"}]}, 'tolerations[0].key: "a b" is not a key'),
    "taint's value": ({"tolerations": [{"key": "a", "value": "x y"}]}, 'tolerations[0].value: "x y" is not a label\'s value'),
    "all taints": ({"tolerations": [{"value": "x"}]}, "tolerations[0].operator: Equal needs a key"),
    "Exists": ({"tolerations": [{"key": "a", "operator": "Exists", "value": "x"}]}, 'tolerations[0].value: "x": Exists has'),
    "seconds": ({"tolerations": [{"key": "a", "tolerationSeconds": 5}]}, "tolerations[0].tolerationSeconds: 5 needs effect"),
    "label": ({"labels": {"a..b/x": "y"}}, 'labels: "a..b/x" is not a key'),
    "annotation": ({"annotations": {"a..b/x": "y"}}, 'annotations: "a..b/x" is not a key'),
    "topology": ({"topologySpreadConstraints": [{"topologyKey": "a..b/x"}]}, 'topologyKey: "a..b/x" is not a key'),
    "driver": ({"volumes": [{"mountPath": "/a", "csi": {"driver": "a..b"}}]}, 'volumes[0].csi.driver: "a..b" is not a name'),
    "files": ({"volumes": [{"mountPath": "/a", "image": {"reference": "a:b:c"}}]}, 'reference: "a:b:c" is not an image'),
    "variable": ({"env": [{"name": "A", "value": "é" * 70_000}]}, "env[A].value: 140,003 bytes with its name"),
    "zero": ({"env": [{"name": "A", "value": "x\0y"}]}, 'env[A].value: "x\\x00y" has a zero'),
}  # fmt: skip


@pytest.mark.parametrize(("template", "said"), (ALL := IMPOSSIBLE | REFUSED).values(), ids=ALL)
def test_what_no_pod_can_be_is_told_with_its_field(template: dict[str, object], said: str) -> None:
    [problem] = map(str, check_run(make_run(sft("base"), template=template)))
    assert problem.startswith("spec.template.")
    assert said in problem
    [problem] = map(str, check_run(make_run({**sft("base"), "template": template})))
    assert problem.startswith("spec.phases[base].template.")


@pytest.mark.parametrize("template", TAKEN.values(), ids=TAKEN)
def test_what_a_pod_can_be_is_taken(template: dict[str, object]) -> None:
    assert not check_run(make_run(sft("base"), template=template))


@pytest.mark.parametrize(("template", "said"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_the_schema_refuses(template: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidRun, match=said):
        load_run(document(sft("base"), template=template))


def test_profiles_are_of_containers_that_are_there() -> None:
    def said(of: str, **spec: object) -> list[str]:
        annotations = {"annotations": {f"{PROFILE}{of}": "unconfined"}}
        return [str(p) for p in check_run(make_run(sft("base"), template=annotations, **spec))]

    assert not said("node")
    assert not said("node", backend="TrainJob")
    [problem] = said("node", backend="PyTorchJob")
    assert (
        problem
        == f"spec.phases[base].template.annotations[{PROFILE}node]: is of no container of its pods; they have pytorch"
    )
    assert said("server")


def test_a_runs_labels_of_other_controllers_are_not_handed_on() -> None:
    labels = {"team": "a", "job-name": "x", "jobset.sigs.k8s.io/replicatedjob-name": "y", LONGEST: "60"}
    run = make_run(sft("base"))
    run = run.model_copy(update={"metadata": run.metadata.model_copy(update={"labels": labels})})
    [action] = [a for a in decide(WORK.applied(run), seen(), START).actions if isinstance(a, Apply)]
    assert action.job.labels.keys() & labels.keys() == {"team", LONGEST}
    assert not check_run(run)


def test_a_queue_is_not_asked_for_by_a_label() -> None:
    queue = "kueue.x-k8s.io/queue-name"

    def said(**spec: object) -> list[str]:
        run = make_run(sft("base"), **spec)
        labelled = run.metadata.model_copy(update={"labels": {queue: "gpus"}})
        return [str(p) for p in check_run(run.model_copy(update={"metadata": labelled}))]

    assert said() == [f'metadata.labels[{queue}]: "gpus" is read of jobs only; set spec.queueName: gpus']
    assert said(queueName="other")
    assert not said(queueName="gpus")


def test_a_priority_is_a_name() -> None:
    run = make_run(sft("base"), queuePriority="Bad Prio!")
    [problem] = map(str, check_run(run))
    assert problem.startswith('spec.queuePriority: "Bad Prio!" is not a name')
    mended = run.model_copy(update={"spec": run.spec.model_copy(update={"queue_priority": "high"})})
    assert not check_run(mended), "an answer is of the priority, too"


@pytest.mark.parametrize(("char", "size"), [("x", 1), ("字", 3)])
def test_settings_that_pods_have_no_room_for(char: str, size: int) -> None:
    def problems(count: int, **template: object) -> list[str]:
        return list(
            map(str, check_run(make_run(sft("base", data={"train": [{"files": char * count}]}), template=template)))
        )

    most = ANNOTATIONS_LIMIT // size
    assert not problems(most - 1000)
    assert problems(most - 1000, annotations={"a": "y" * 4000})
    [problem] = problems(most)
    assert problem.startswith("spec.phases[base].sft: the phase's settings")
    assert "262,144 is what Kubernetes takes" in problem


TWICE = {
    'env[A].name: "A" is the name of 2 variables': {"env": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]},
    'secretRefs: "hub" is there 3 times': {"secretRefs": ["hub", "other", "hub", "hub"]},
    'imagePullSecrets: "pull" is there 2 times': {"imagePullSecrets": ["pull", "pull"]},
    'resourceClaims[gpu].name: "gpu" is the name of 2 claims': {
        "resourceClaims": [{"name": "gpu", "resourceClaimName": "a"}, {"name": "gpu", "resourceClaimName": "b"}]
    },
    'topologySpreadConstraints: "zone, DoNotSchedule" is what 2 of them say': {
        "topologySpreadConstraints": [{"topologyKey": "zone"}, {"topologyKey": "zone", "maxSkew": 2}]
    },
}


@pytest.mark.parametrize("said", TWICE)
def test_what_is_said_twice_is_told_and_what_runs_with_it_goes_on(said: str) -> None:
    for path, run in (
        ("spec.template", document(sft("base"), template=TWICE[said])),
        ("spec.phases[base].template", document(sft("base") | {"template": TWICE[said]})),
    ):
        with pytest.raises(InvalidRun) as caught:
            load_run(run)
        assert f"{path}.{said}" in str(caught.value)
        assert not check_run(make_run(*run["spec"]["phases"], template=run["spec"].get("template", {})))


def test_the_same_place_of_another_kind_is_not_said_twice() -> None:
    spread = [{"topologyKey": "zone"}, {"topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}]
    load_run(document(sft("base"), template={"topologySpreadConstraints": spread}))


def test_it_is_told_at_once_and_ends_nothing_that_runs() -> None:
    """A rule that is stricter than an earlier operator's never costs the work of a night."""
    good = make_run(sft("base"), template={"image": "i:1"})
    running = decide(good, seen(), START)
    bad = make_run(sft("base"), template={"image": "i:1", "serviceAccountName": "Bad_Name"})
    new = decide(bad, seen(), START)
    assert not new.actions
    accepted = new.status.condition(meta.ACCEPTED)
    assert accepted is not None
    assert (accepted.status, accepted.reason) == ("False", meta.INVALID_SPEC)
    assert "Bad_Name" in accepted.message
    live = seen(job(good, "base", state=JobState.LIVE))
    still = decide(with_status(bad, running), live, START)
    assert not still.actions
    assert not still.status.is_true(meta.FAILED)


def test_all_that_a_process_can_have_is_taken() -> None:
    value = "x" * (VARIABLE_LIMIT - len("A=") - 1)
    assert not check_run(make_run(sft("base"), template={"env": [{"name": "A", "value": value}]}))
