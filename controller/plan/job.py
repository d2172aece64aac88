"""What to run for one attempt at a phase: says what, not how."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from controller.api import meta
from controller.api.run import AlignmentRun
from controller.api.template import Template
from controller.api.workspace import Workspace
from controller.plan.foreign import handed_on
from controller.plan.resolve import ResolvedPhase
from trainers import __version__
from trainers.contract import Input, PhaseFile
from trainers.spec import shrunk

NAME_LIMIT = 45
"""Characters of a job's name. 63 is the limit of its pods' names, which append `-worker-NNNN`, or `-node-0-NNNN-xxxxx`."""
MARK_BITS = 60
ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"


@dataclass(frozen=True)
class PhaseJob:
    run: str
    phase: str
    type: str
    attempt: int
    name: str
    """Its own in the namespace."""
    digest: str
    """Identity of what is asked for."""
    image: str
    nodes: int
    procs_per_node: int
    spec: Mapping[str, Any]
    """The phase's settings, resolved."""
    inputs: Mapping[str, str]
    """Artifact digests of the finished phases it builds on."""
    template: Template = field(default_factory=Template)
    """Environment, resources and placement."""
    workspace: Workspace | None = None
    queue_name: str | None = None
    queue_priority: str | None = None
    node_lost_seconds: int = 120
    """How long a node may be silent before its part of the job is given up."""
    avoid_nodes: tuple[str, ...] = ()
    """Nodes on which earlier attempts failed."""
    halvings: int = 0
    """Of what memory goes into, which the settings have already."""
    labels: Mapping[str, str] = field(default_factory=dict)
    alone: bool = True
    """Nothing else runs or could run beside it now. A hint for sharing one machine; not part of what is asked for."""

    def phase_file(self, workspace: str, base_dir: str, folder: str = "") -> PhaseFile:
        """The file the phase program reads, given where it will see the workspace and the user's files.

        ``folder``: the run's in the workspace, if that is not its name.
        """
        root = f"{workspace}/{folder or self.run}"
        file = PhaseFile(
            version=__version__,
            digest=self.digest,
            run=self.run,
            phase=self.phase,
            output=f"{root}/{self.phase}",
            base_dir=base_dir,
            image=self.image,
            inputs={name: Input(path=f"{root}/{name}", digest=digest) for name, digest in self.inputs.items()},
            spec=dict(self.spec),
        )
        return file.model_copy(update={"digest_of": file.mark})


def build_job(
    run: AlignmentRun, phase: ResolvedPhase, attempt: int, digest: str, inputs: Mapping[str, str],
    avoid_nodes: tuple[str, ...], alone: bool, halvings: int = 0, nodes: int = 0,
) -> PhaseJob:  # fmt: skip
    return PhaseJob(
        run=run.name,
        phase=phase.name,
        type=phase.type.name,
        attempt=attempt,
        name=job_name(run.name, phase.name, attempt),
        digest=digest,
        image=phase.image,
        nodes=nodes or phase.nodes,
        procs_per_node=phase.procs_per_node,
        # Only what is set: a trainer of another version has other defaults, and refuses what it does not know. Nulls stay: a
        # default that the user turned off must not come back when the phase reads its file.
        spec=shrunk(phase.spec, halvings).model_dump(by_alias=True, mode="json", exclude_unset=True),
        inputs=dict(inputs),
        template=phase.template,
        workspace=run.spec.workspace,
        queue_name=run.spec.queue_name,
        queue_priority=run.spec.queue_priority,
        node_lost_seconds=run.spec.failure_policy.node_lost_seconds,
        avoid_nodes=avoid_nodes,
        halvings=halvings,
        labels={**handed_on(run.metadata.labels), **job_labels(run.name, phase.name, phase.type.name, attempt)},
        alone=alone,
    )


def job_name(run: str, phase: str, attempt: int) -> str:
    """`<run>-<phase>-<attempt>` where that can be read in one way only, else with a mark behind it. Always the same.

    No two runs of a namespace share one. Names without a mark have three parts, and end with a number; a mark begins with a
    letter. Run, phase and attempt together are longer than a name may be, so marks are a hash: long enough that nobody
    finds two alike by chance or by trying. Services, unlike runs, may not begin with a digit.
    """
    plain = f"{run}-{phase}-{attempt}"
    if plain.count("-") == 2 and run[0].isalpha() and len(plain) <= NAME_LIMIT:
        return plain
    tail = f"-{attempt}-{_mark(run, phase)}"
    head = f"{run}-{phase}" if run[0].isalpha() else f"r{run}-{phase}"
    return head[: NAME_LIMIT - len(tail)].rstrip("-") + tail


def _mark(run: str, phase: str) -> str:
    """Neither name has a slash."""
    number = int.from_bytes(hashlib.sha256(f"{run}/{phase}".encode()).digest()[:8]) % 2**MARK_BITS
    return "x" + "".join(ALPHABET[number >> shift & 31] for shift in range(0, MARK_BITS, 5))


def kin(run: str) -> dict[str, str]:
    """Of all that is made for a run, in the words that Kubernetes recommends."""
    return {meta.LABEL_NAME: "alignment-trainer", meta.LABEL_PART_OF: run}


def job_labels(run: str, phase: str, type_name: str, attempt: int) -> dict[str, str]:
    return {
        **kin(run),
        meta.LABEL_COMPONENT: type_name,
        meta.LABEL_MANAGED_BY: meta.PRODUCT,
        meta.LABEL_RUN: run,
        meta.LABEL_PHASE: phase,
        meta.LABEL_ATTEMPT: str(attempt),
    }
