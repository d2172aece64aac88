"""Packaging: exported models with cards, plots, samples, all figures in one file, and the report."""

from trainers import jsonl
from trainers.core.context import ARTIFACT_NAMES, Outcome, PhaseContext
from trainers.files import write_atomic
from trainers.phases.package.card import model_card
from trainers.phases.package.export import export_model
from trainers.phases.package.gather import gather
from trainers.phases.package.plots import comparison_plots, training_plots
from trainers.phases.package.report import everything, report
from trainers.phases.package.samples import side_by_side
from trainers.phases.package.spec import PackageSpec
from trainers.phases.package.templating import render


def main(spec: PackageSpec, ctx: PhaseContext) -> Outcome:
    # ---- set up
    run = gather(ctx, spec)
    exports = [*((m, False) for m in run.models), *((m, True) for m in run.reward_models)]
    ctx.meter.begin(0, len(exports) + 1, spec.document())
    outcome = Outcome({"models": len(exports)}, [], len(exports) + 1)
    if not ctx.workers.is_main:
        return outcome

    # ---- models
    root = ctx.dir.root
    for step, (model, is_reward_model) in enumerate(exports, 1):
        ctx.meter.stage(f"exporting {model.label}")
        export_model(model, root / "models" / model.label, model_card(run, model, is_reward_model))
        ctx.meter.log(step)

    # ---- report
    ctx.meter.stage("report")
    title = spec.title or run.name
    samples = {e.phase.name: found for e in run.evaluations if (found := side_by_side(e, spec.samples))}
    plots = [plot for phase in run.phases.values() for plot in training_plots(phase)]
    compared = [plot for evaluation in run.evaluations for plot in comparison_plots(evaluation)]
    for plot in [*plots, *compared]:
        write_atomic(root / "plots" / f"{plot.name}.svg", plot.svg)
    entries = [{"evaluation": name, **entry} for name, found in samples.items() for entry in found]
    write_atomic(root / "samples.jsonl", jsonl.dumps(entries))
    write_atomic(root / "samples.md", render("samples.md.j2", title=title, entries=entries))
    write_atomic(root / "metrics.json", everything(run))
    write_atomic(root / ARTIFACT_NAMES["package"], report(run, title, samples, plots, compared))
    ctx.meter.log(len(exports) + 1)
    print(f"report: {root / ARTIFACT_NAMES['package']}")
    return outcome
