"""`alignctl plan`: what a run would do, and why."""

import asyncio

import typer
from rich.console import Console
from rich.table import Table

from controller.commands.run import Request, local_backend
from controller.plan.explain import PhasePlan, explain

COLOURS = {"reuse": "green", "run": "bold", "continue": "cyan", "skip": "dim"}


def plan_command(request: Request) -> int:
    run = request.load()
    only = request.selection(run)
    plans = explain(run, asyncio.run(local_backend(request, run).survey(run)), only)
    console = Console()
    if console.is_terminal:
        console.print(_plan_table(plans))
    else:
        width = max(len(plan.name) for plan in plans)
        for plan in plans:
            typer.echo(f"{plan.name:<{width}}  {plan.type:<8}  {plan.action:<8}  {plan.why}")
    return 0


def _plan_table(plans: tuple[PhasePlan, ...]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("phase", "type", "plan", "why"):
        table.add_column(name, style="dim" if name == "type" else None)
    for plan in plans:
        table.add_row(plan.name, plan.type, f"[{COLOURS[plan.action]}]{plan.action}[/]", plan.why)
    return table
