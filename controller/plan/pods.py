"""What no pod can be: said at once, since the pods would be refused when they are made, and nobody told but by an event."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from controller.api import meta
from controller.api.problems import Problem, shown
from controller.api.quantities import number
from controller.api.run import AlignmentRun
from controller.api.syntax import (
    ANNOTATION,
    FOLDER_WITHIN,
    IMAGE,
    QUALIFIED,
    RESOURCE,
    SHORT_SUBDOMAIN,
    SUBDOMAIN,
    VALUE,
    Syntax,
)  # fmt: skip
from controller.api.template import Resources, Template
from controller.api.text import UNFIT
from controller.plan.foreign import foreign_problems, queue_problems
from controller.plan.job import build_job
from controller.plan.place import folder_of
from controller.plan.resolve import ResolvedPhase, resolve
from controller.plan.shares import share_problems

ANNOTATIONS_LIMIT = 256 * 1024
"""Bytes of a pod's annotations, with their names: a phase's settings are one of them."""
VARIABLE_LIMIT = 128 * 1024
"""Bytes of `NAME=VALUE` and the zero behind it, of which Linux starts no process with more (MAX_ARG_STRLEN)."""
WORKSPACE = "/workspace"
DIGEST = "d" * 64

Said = Iterator[tuple[str, str, Syntax]]
"""Where, what, and what it has to be."""


def pod_problems(run: AlignmentRun) -> Iterator[Problem]:
    """Of templates, each as it is written, and of the run's priority."""
    yield from queue_problems(run)
    if run.spec.queue_priority:
        yield from _misspelt([("spec.queuePriority", run.spec.queue_priority, SHORT_SUBDOMAIN)])
    for path, template in templates(run):
        yield from _misspelt((f"{path}.{where}", value, syntax) for where, value, syntax in _all_said(template))
        yield from _toleration_problems(path, template)
        for where, resources in _resources(template):
            yield from share_problems(f"{path}.{where}", resources)
        yield from _volume_problems(path, template)
        yield from foreign_problems(path, template)
        yield from _variable_problems(path, template)


def templates(run: AlignmentRun) -> Iterator[tuple[str, Template]]:
    yield "spec.template", run.spec.template
    yield from ((f"spec.phases[{e.name}].template", e.template) for e in run.phases if e.template)


def settings_problems(run: AlignmentRun) -> Iterator[Problem]:
    """Of phases whose settings are too large for their pods. References have been checked."""
    for phase in resolve(run):
        if (size := _annotation_bytes(run, phase)) > ANNOTATIONS_LIMIT:
            most = f"{ANNOTATIONS_LIMIT:,} is what Kubernetes takes"
            said = f"the phase's settings and its pods' annotations are {size:,} bytes; {most}: name fewer or shorter things"
            yield Problem(f"spec.phases[{phase.name}].{phase.type.name}", said)


def said_twice(run: AlignmentRun) -> Iterator[Problem]:
    """As the CRD says it. Of a run that is there from before it did, the last one counts."""
    for path, template in templates(run):
        for where, words, names in _keyed(template):
            for name, count in Counter(names).items():
                if count > 1:
                    yield Problem(f"{path}.{where.format(name)}", f'"{name}" {words.format(count)}; one of each')


def _keyed(template: Template) -> Iterator[tuple[str, str, list[str]]]:
    """Where, what is said of a key that is there more than once, and the keys."""
    yield "env[{}].name", "is the name of {} variables", [item.name for item in template.env]
    yield "resourceClaims[{}].name", "is the name of {} claims", [item.name for item in template.resource_claims or ()]
    yield "secretRefs", "is there {} times", list(template.secret_refs)
    yield "imagePullSecrets", "is there {} times", list(template.image_pull_secrets or ())
    spreads = template.topology_spread_constraints or ()
    spread = [f"{item.topology_key}, {item.when_unsatisfiable}" for item in spreads]
    yield "topologySpreadConstraints", "is what {} of them say (topologyKey, whenUnsatisfiable)", spread


def _annotation_bytes(run: AlignmentRun, phase: ResolvedPhase) -> int:
    job = build_job(run, phase, 1, DIGEST, dict.fromkeys(phase.inputs, DIGEST), (), alone=True)
    file = job.phase_file(WORKSPACE, WORKSPACE, folder_of(run)).model_dump_json(by_alias=True, exclude_unset=True)
    found = {**(phase.template.annotations or {}), meta.ANNOTATION_PHASE_FILE: file}
    return sum(len(text.encode(errors="replace")) for item in found.items() for text in item)


def _misspelt(said: Iterable[tuple[str, str, Syntax]]) -> Iterator[Problem]:
    for path, value, syntax in said:
        if not syntax.fits(value):
            yield Problem(path, f"{_seen(value)} is not {syntax.words}")


def _seen(value: str) -> str:
    """With what nobody sees written out: it is the mistake."""
    return shown(ascii(value)[1:-1] if UNFIT.search(value) else value)


def _all_said(template: Template) -> Said:
    for where, value, syntax in (
        ("image", template.image, IMAGE),
        ("server.image", template.server.image if template.server else None, IMAGE),
        ("serviceAccountName", template.service_account_name, SUBDOMAIN),
        ("priorityClassName", template.priority_class_name, SUBDOMAIN),
        ("runtimeClassName", template.runtime_class_name, SUBDOMAIN),
    ):
        if value:
            yield where, value, syntax
    yield from ((f"secretRefs[{i}]", name, SUBDOMAIN) for i, name in enumerate(template.secret_refs))
    yield from ((f"imagePullSecrets[{i}]", name, SUBDOMAIN) for i, name in enumerate(template.image_pull_secrets or ()))
    yield from _labels("nodeSelector", template.node_selector)
    yield from _labels("labels", template.labels or {})
    yield from (("annotations", key, ANNOTATION) for key in template.annotations or {})
    for path, resources in _resources(template):
        yield from ((f"{path}.requests", name, RESOURCE) for name in resources.requests)
        yield from ((f"{path}.limits", name, RESOURCE) for name in resources.limits)
    yield from _mounted(template)
    yield from _placed(template)


def _labels(where: str, labels: Mapping[str, str]) -> Said:
    for key, value in labels.items():
        yield where, key, QUALIFIED
        yield f"{where}[{key}]", value, VALUE


def _resources(template: Template) -> Iterator[tuple[str, Resources]]:
    if template.resources:
        yield "resources", template.resources
    if template.server and template.server.resources:
        yield "server.resources", template.server.resources


def _mounted(template: Template) -> Said:
    for i, claim in enumerate(template.claims):
        yield f"claims[{i}].claimName", claim.claim_name, SUBDOMAIN
        yield f"claims[{i}].subPath", claim.sub_path or "", FOLDER_WITHIN
    for i, volume in enumerate(template.volumes or ()):
        if volume.ephemeral and volume.ephemeral.storage_class_name:
            yield f"volumes[{i}].ephemeral.storageClassName", volume.ephemeral.storage_class_name, SUBDOMAIN
        if volume.csi:
            yield f"volumes[{i}].csi.driver", volume.csi.driver, SHORT_SUBDOMAIN
        if volume.image:
            yield f"volumes[{i}].image.reference", volume.image.reference, IMAGE
    for i, device in enumerate(template.resource_claims or ()):
        named = {
            "resourceClaimName": device.resource_claim_name, "resourceClaimTemplateName": device.resource_claim_template_name,
        }  # fmt: skip
        yield from ((f"resourceClaims[{i}].{field}", name, SUBDOMAIN) for field, name in named.items() if name)


def _placed(template: Template) -> Said:
    for i, toleration in enumerate(template.tolerations):
        if toleration.key:
            yield f"tolerations[{i}].key", toleration.key, QUALIFIED
        if toleration.operator == "Equal":
            yield f"tolerations[{i}].value", toleration.value or "", VALUE
    if template.affinity:
        yield from ((f"affinity.nodes[{i}].key", node.key, QUALIFIED) for i, node in enumerate(template.affinity.nodes))
        for i, pods in enumerate(template.affinity.pods):
            yield f"affinity.pods[{i}].topologyKey", pods.topology_key, QUALIFIED
            yield from _labels(f"affinity.pods[{i}].matchLabels", pods.match_labels or {})
    for i, spread in enumerate(template.topology_spread_constraints or ()):
        yield f"topologySpreadConstraints[{i}].topologyKey", spread.topology_key, QUALIFIED
        yield from _labels(f"topologySpreadConstraints[{i}].matchLabels", spread.match_labels or {})


def _toleration_problems(path: str, template: Template) -> Iterator[Problem]:
    for i, toleration in enumerate(template.tolerations):
        where = f"{path}.tolerations[{i}]"
        if not toleration.key and toleration.operator != "Exists":
            yield Problem(
                f"{where}.operator", f"{toleration.operator} needs a key; Exists without one tolerates all taints"
            )
        if toleration.operator == "Exists" and toleration.value:
            yield Problem(f"{where}.value", f"{_seen(toleration.value)}: Exists has no value; with one it is Equal")
        seconds = toleration.toleration_seconds
        if seconds is not None and toleration.effect != "NoExecute":
            yield Problem(f"{where}.tolerationSeconds", f"{seconds} needs effect: NoExecute")
        if seconds is not None and not -(2**63) <= seconds < 2**63:
            yield Problem(f"{where}.tolerationSeconds", f"{seconds} is more than 64 bits hold; unset is for ever")


def _volume_problems(path: str, template: Template) -> Iterator[Problem]:
    for i, volume in enumerate(template.volumes or ()):
        if volume.ephemeral and not number(volume.ephemeral.size):
            yield Problem(
                f"{path}.volumes[{i}].ephemeral.size", f'"{volume.ephemeral.size}" is no size: more than 0 (500Gi)'
            )


def _variable_problems(path: str, template: Template) -> Iterator[Problem]:
    for item in template.env:
        size = len(f"{item.name}={item.value}".encode(errors="replace")) + 1
        if size > VARIABLE_LIMIT:
            most = f"no process has one of more than {VARIABLE_LIMIT:,}; put it into a file"
            yield Problem(f"{path}.env[{item.name}].value", f"{size:,} bytes with its name: {most}")
        if "\0" in item.value:
            yield Problem(
                f"{path}.env[{item.name}].value", f"{_seen(item.value)} has a zero, with which a variable ends"
            )
