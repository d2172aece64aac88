"""Packaging: what a run made, in a form to keep, to hand on and to read.

``models/`` holds every model as a Hugging Face folder with a card; ``report.html`` shows what each step did.
"""

import json

from trainers.contract import PhaseDir, write_atomic
from trainers.core.context import Outcome, PhaseContext
from trainers.phases.package.export import export_models
from trainers.phases.package.gather import Gathered, gather
from trainers.phases.package.plots import plots_of
from trainers.phases.package.report import report_html
from trainers.phases.package.samples import as_jsonl, side_by_side
from trainers.phases.package.spec import PackageSpec


def main(spec: PackageSpec, ctx: PhaseContext) -> Outcome:
    ctx.meter.begin(0, 3, spec.document())
    gathered = gather(ctx.file.run, {name: PhaseDir(ctx.input_dir(name).root).root for name in ctx.file.inputs})
    labels = {model.phase: model.label for model in spec.models if model.phase}
    if ctx.workers.is_main:
        exported = export_models(gathered, labels, ctx.dir.root)
        ctx.meter.log(1)
        _write_records(spec, ctx, gathered, labels, exported)
        ctx.meter.log(3)
    return Outcome({"models": float(len(labels)), "phases": float(len(gathered.phases))}, steps=3)


def _write_records(
    spec: PackageSpec, ctx: PhaseContext, gathered: Gathered, labels: dict[str, str], exported: dict[str, str]
) -> None:
    root = ctx.dir.root
    samples = side_by_side(gathered.evaluation, spec.samples)
    plots = plots_of(gathered.phases)
    write_atomic(root / "samples.jsonl", as_jsonl(samples))
    write_atomic(root / "metrics.json", json.dumps(_metrics(gathered, exported), indent=1))
    for plot in plots:
        write_atomic(root / "plots" / f"{plot.name}.svg", plot.svg)
    ctx.meter.log(2)
    write_atomic(root / "report.html", report_html(gathered, labels, plots, samples, spec.title or gathered.run))


def _metrics(gathered: Gathered, exported: dict[str, str]) -> dict[str, object]:
    phases = {phase.name: {**phase.result.document(), "export": exported.get(phase.name)} for phase in gathered.phases}
    evaluation = gathered.evaluation
    return {
        "run": gathered.run,
        "phases": phases,
        "evaluation": evaluation.results if evaluation else None,
        "latency": evaluation.latency if evaluation else None,
    }
