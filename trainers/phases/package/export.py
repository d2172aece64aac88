"""Model folders for users: the phase's model by hard links, and a card."""

import shutil
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from trainers.contract import commit_directory, link_or_copy
from trainers.phases.package.compare import number
from trainers.phases.package.gather import Gathered, Phase

KINDS = {"model": "causal language model", "reward-model": "reward model"}


def environment() -> Environment:
    """Templates of this package; everything is escaped, because models may write anything."""
    loader = PackageLoader("trainers.phases.package", "templates")
    found = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    found.filters["number"] = number
    return found


def export_models(gathered: Gathered, labels: dict[str, str], root: Path) -> dict[str, str]:
    """Write ``models/<label>/`` for every labelled phase and reward model. Returns folder by phase."""
    temporary = root / ".models.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    exported = {}
    for phase in gathered.phases:
        kind = next((kind for kind in KINDS if phase.artifact(kind)), None)
        if kind == "reward-model" or phase.name in labels:
            source = phase.artifact(kind or "model")
            assert source is not None
            label = labels.get(phase.name, phase.name)
            shutil.copytree(source, temporary / label, copy_function=link_or_copy)
            card = temporary / label / "README.md"
            card.unlink(missing_ok=True)  # a link to the phase's own file must not be written through
            card.write_text(model_card(gathered, phase, label, KINDS[kind or "model"]))
            exported[phase.name] = f"models/{label}"
    commit_directory(temporary, root / "models")
    return exported


def model_card(gathered: Gathered, phase: Phase, label: str, kind: str) -> str:
    env = environment().overlay(autoescape=False)
    return env.get_template("card.md.j2").render(
        run=gathered.run,
        phase=phase,
        result=phase.result,
        label=label,
        kind=kind,
        lineage=lineage(gathered, phase),
        figures=figures(gathered, label),
        settings=flat_settings(phase.result.settings),
    )


def lineage(gathered: Gathered, phase: Phase) -> list[Phase]:
    """The phase and the phases its weights came through, the oldest first."""
    chain = [phase]
    while (parent := gathered.phase(chain[0].parent or "")) is not None:
        chain.insert(0, parent)
    return chain


def figures(gathered: Gathered, label: str) -> list[dict[str, Any]]:
    """The model's evaluation, metric by metric."""
    if gathered.evaluation is None or label not in gathered.evaluation.results["values"]:
        return []
    values = gathered.evaluation.results["values"][label]
    return [{**metric, **values[metric["key"]]} for metric in gathered.evaluation.results["metrics"] if metric["key"] in values]


def flat_settings(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Dotted paths and values, for tables."""
    rows: list[tuple[str, str]] = []
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            rows += flat_settings(value, f"{prefix}{key}.")
        elif value not in ({}, [], None):
            rows.append((f"{prefix}{key}", _short(value)))
    return rows


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 120 else text[:117] + "..."
