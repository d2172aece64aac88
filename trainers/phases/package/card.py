"""A model card: what the model is, what it was made from, how it does, and what is not known about it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainers.core.export import ADAPTER
from trainers.core.reward_models import MARK
from trainers.phases.package.effects import benchmark_name
from trainers.phases.package.gather import Model, Phase, Run
from trainers.phases.package.templating import render

HIDDEN = ("tracking", "checkpoint", "gates", "parallel")
"""Settings that say nothing about the model."""


def model_card(run: Run, model: Model, reward_model: bool = False) -> str:
    """README.md of an exported model."""
    return render(
        "card.md.j2",
        run=run,
        model=model,
        result=model.phase.result,
        reward_model=reward_model,
        read_at=score_tokens(model.path) if reward_model else [],
        adapter=(model.path / ADAPTER).is_dir(),
        chain=[model.phase, *run.ancestors(model.phase)],
        settings=dict(flat(shown_settings(model.phase))),
        data=data_rows(model.phase),
        evaluations=[
            (e, label, _figures(e.results, label)) for e in run.evaluations if (label := e.label(model.phase.name))
        ],
    )


def score_tokens(folder: Path) -> list[str]:
    """The tokens at which a reward model's score is read, as they are written."""
    from transformers import AutoTokenizer

    ids = json.loads((folder / "config.json").read_text()).get(MARK, [])
    return [f"`{token}`" for token in AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(ids)]


def _figures(results: Mapping[str, Any], label: str) -> list[dict[str, Any]]:
    values = results["values"].get(label, {})
    return [
        {"name": f"{benchmark_name(metric)}: {metric['label']}", **values[metric["key"]]}
        for metric in results["metrics"]
        if metric["key"] in values
    ]


def data_rows(phase: Phase) -> list[dict[str, Any]]:
    """The phase's data sources, each with where it came from and how many rows of it were used."""
    rows = []
    for record in phase.result.data:
        source = _at(phase.result.settings, record.source)
        rows.append({**record.document(), "what": describe_source(source)})
    return rows


def describe_source(source: Any) -> str:
    """A data source in words."""
    if not isinstance(source, dict):
        return "–"
    if synthetic := source.get("synthetic"):
        return f"synthetic {synthetic['task']}/{synthetic['split']}, seed {synthetic.get('seed', 0)}"
    if hub := source.get("hub"):
        return f"{hub['name']}[{hub.get('split', 'train')}]{'@' + hub['revision'] if hub.get('revision') else ''}"
    return str(source.get("files", "–"))


def _at(settings: Any, path: str) -> Any:
    """The value at a dotted path such as `data.train[0]`; None if there is none."""
    for part in path.replace("[", ".").replace("]", "").split("."):
        try:
            settings = settings[int(part)] if isinstance(settings, list) else settings[part]
        except (KeyError, IndexError, TypeError, ValueError):
            return None
    return settings


def shown_settings(phase: Phase) -> dict[str, Any]:
    return {key: value for key, value in phase.result.settings.items() if key not in HIDDEN}


def flat(settings: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested settings by dotted path; empty ones are left out."""
    if isinstance(settings, dict) and settings:
        for key, value in settings.items():
            yield from flat(value, f"{path}.{key}" if path else key)
    elif isinstance(settings, list) and settings:
        for i, value in enumerate(settings):
            yield from flat(value, f"{path}[{i}]")
    elif settings not in ({}, [], None):
        yield path, settings
