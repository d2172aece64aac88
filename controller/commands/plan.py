"""`alignctl plan`: what a run would do, why, and what its phases will need of their devices."""

import asyncio

from rich.console import Console
from rich.table import Table

from controller.commands.run import Request, local_backend
from controller.commands.say import say
from controller.commands.sizes import COLUMNS, plain_lines, remarks, row, sizes_here
from controller.plan.explain import PhasePlan, explain
from controller.plan.sizes import PhaseSize

TITLE = "memory of one device, by arithmetic"
COLOURS = {"reuse": "green", "run": "bold", "continue": "cyan", "skip": "dim"}


def plan_command(request: Request) -> int:
    run = request.load(local=False)
    only = request.selection(run)
    plans = explain(run, asyncio.run(local_backend(request, run).survey(run)), only)
    sizes = sizes_here(run, request.base_dir)
    needed = [sizes[plan.name] for plan in plans if plan.name in sizes and plan.action in ("run", "continue")]
    known = [size for size in needed if size.needs is not None]
    console = Console()
    if console.is_terminal:
        console.print(_plan_table(plans))
        if known:
            console.print(f"\n{TITLE}", _size_table(known), sep="\n")
    else:
        width = max(len(plan.name) for plan in plans)
        for plan in plans:
            say(f"{plan.name:<{width}}  {plan.type:<8}  {plan.action:<8}  {plan.why}")
        if known:
            say("\n".join(["", TITLE, *plain_lines(known)]))
    for remark in remarks(needed):
        say(remark, color="yellow", err=True)
    return 0


def _plan_table(plans: tuple[PhasePlan, ...]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("phase", "type", "plan", "why"):
        table.add_column(name, style="dim" if name == "type" else None)
    for plan in plans:
        table.add_row(plan.name, plan.type, f"[{COLOURS[plan.action]}]{plan.action}[/]", plan.why)
    return table


def _size_table(sizes: list[PhaseSize]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in COLUMNS:
        table.add_column(name, justify="left" if name in ("phase", "models") else "right")
    for size in sizes:
        style = "red" if size.fits is False else None
        table.add_row(*row(size), style=style)
    return table
