"""Labels and annotations by which other controllers, and this one, know what is theirs.

A pod that bears them is not made, or is taken for somebody else's, and nobody is told but by an event on what lies between the
run and its pods. A run may bear them for reasons of its own: they are not handed on.
"""

from collections.abc import Iterator, Mapping

from controller.api import meta
from controller.api.backend import CONTAINERS
from controller.api.labels import OWN_LABELS, OWN_PREFIXES
from controller.api.problems import Problem, shown
from controller.api.run import AlignmentRun
from controller.api.template import Template
from controller.plan.resolve import ResolvedPhase, resolve

JOBS = ("batch.kubernetes.io/", "jobset.sigs.k8s.io/", "training.kubeflow.org/", "trainer.kubeflow.org/")
OLD_JOBS = ("job-name", "controller-uid")
KUEUE = "kueue.x-k8s.io/"
LONGEST = f"{KUEUE}max-exec-time-seconds"
"""The one label of Kueue's that only says something of a job."""
KUBELET = "kubernetes.io/config."
"""Of pods that a node has from a file."""
RETIRED = (
    "scheduler.alpha.kubernetes.io/",
    "seccomp.security.alpha.kubernetes.io/",
    "container.seccomp.security.alpha.kubernetes.io/",
)
"""Fields have taken their place, and contradict them."""
COST = "controller.kubernetes.io/pod-deletion-cost"
PROFILE = "container.apparmor.security.beta.kubernetes.io/"
PROFILES = ("runtime/default", "unconfined", "localhost/")
SERVER = "server"


def handed_on(labels: Mapping[str, str]) -> dict[str, str]:
    """A run's labels, to what is made for it: those by which nobody knows what is whose."""
    return {key: value for key, value in labels.items() if key == LONGEST or not (_is_foreign(key) or _is_own(key))}


def _is_own(key: str) -> bool:
    """What is made for a run has these from the operator, or not at all."""
    return key.startswith(OWN_PREFIXES) or key in OWN_LABELS


def _is_foreign(key: str) -> bool:
    return key.startswith((*JOBS, KUEUE)) or key in OLD_JOBS


def queue_problems(run: AlignmentRun) -> Iterator[Problem]:
    """Kueue's labels on a run, where another queue is meant than the run says."""
    for label, field, said in (
        (meta.LABEL_QUEUE, "queueName", run.spec.queue_name),
        (meta.LABEL_QUEUE_PRIORITY, "queuePriority", run.spec.queue_priority),
    ):
        if (meant := run.metadata.labels.get(label)) and meant != said:
            yield Problem(
                f"metadata.labels[{label}]", f"{shown(meant)} is read of jobs only; set spec.{field}: {meant}"
            )


def foreign_problems(path: str, template: Template) -> Iterator[Problem]:
    for key in template.labels or {}:
        if _is_foreign(key):
            yield Problem(f"{path}.labels", f"{shown(key)} is how another controller knows its pods: leave it out")
    for key, value in (template.annotations or {}).items():
        if said := _annotation_problem(key, value):
            yield Problem(f"{path}.annotations[{key}]", said)


def _annotation_problem(key: str, value: str) -> str:
    if key.startswith((*JOBS, KUBELET)):
        return "is how another controller knows its pods: leave it out"
    if key.startswith(RETIRED):
        return "is retired: a field has taken its place; leave it out"
    if key == COST and not _is_cost(value):
        return f"{shown(value)} is not a whole number of 32 bits"
    if key.startswith(PROFILE) and not value.startswith(PROFILES):
        return f"{shown(value)} is no profile: runtime/default, localhost/NAME or unconfined"
    return ""


def _is_cost(text: str) -> bool:
    digits = text.removeprefix("-")
    plain = digits.isascii() and digits.isdigit() and (digits == "0" or not digits.startswith("0"))
    return plain and len(digits) <= 10 and -(2**31) <= int(text) < 2**31


def profile_problems(run: AlignmentRun) -> Iterator[Problem]:
    """Profiles of containers that are not there. References have been checked."""
    for phase in resolve(run):
        there = _containers(run, phase)
        for key in phase.template.annotations or {}:
            if key.startswith(PROFILE) and key.removeprefix(PROFILE) not in there:
                said = f"is of no container of its pods; they have {', '.join(there)}"
                yield Problem(f"spec.phases[{phase.name}].template.annotations[{key}]", said)


def _containers(run: AlignmentRun, phase: ResolvedPhase) -> list[str]:
    """Without a backend, those of each kind of job: it is the operator's default."""
    trainers = [CONTAINERS[run.spec.backend]] if run.spec.backend else [*CONTAINERS.values()]
    return [*trainers, *([SERVER] if phase.template.server is not None and phase.spec.starts_server else [])]
