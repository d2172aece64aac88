"""What phases take from this machine beside GPUs: said before the first one begins, not when their turn comes, hours later."""

import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import PurePath

from controller.api.problems import Problem
from controller.api.run import AlignmentRun
from controller.plan.resolve import ResolvedPhase, resolve
from trainers.spec import OwnServer, Served
from trainers.spec.base import find_models


def missing(run: AlignmentRun, phases: Collection[str], environ: Mapping[str, str]) -> list[Problem]:
    """``phases``: names of those that may begin."""
    chosen = [phase for phase in resolve(run) if phase.name in phases]
    return [problem for phase in chosen for problem in _missing(phase, environ)]


def _missing(phase: ResolvedPhase, environ: Mapping[str, str]) -> Iterator[Problem]:
    known = {**environ, **{item.name: item.value for item in phase.template.env}}
    where = f"spec.phases[{phase.name}].{phase.type.name}"
    if phase.spec.starts_server:
        program = (getattr(phase.spec, "server", None) or OwnServer()).command[0]
        beside = (
            "/" in program and not PurePath(program).is_absolute()
        )  # where the phase looks for it is its own matter
        if not beside and shutil.which(program, path=known.get("PATH")) is None:
            said = f"this machine has no program {program}: install vLLM, and set the path of what starts it"
            yield Problem(f"{where}.server.command", said)
    for path, served in find_models(phase.spec, Served):
        if served.key_variable is not None and served.key_variable not in known:
            yield Problem(f"{where}.{path}.keyVariable", f"the environment has no {served.key_variable}: export it")
