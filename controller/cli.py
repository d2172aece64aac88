"""`alignctl`: one resource, run on one machine or applied to a cluster."""

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from controller import workspace
from controller.api.problems import InvalidRun

app = typer.Typer(
    help="Run alignment pipelines: supervised fine-tuning, reward models, DPO, PPO, distillation, evaluation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

BAD_INPUT = 2

File = Annotated[Path, typer.Argument(help="An AlignmentRun in YAML.", show_default=False)]
Fragments = Annotated[
    list[Path],
    typer.Option(
        "-f",
        "--fragment",
        default_factory=list,
        help="A partial AlignmentRun merged over FILE; several are merged in order.",
        show_default=False,
    ),
]
Settings = Annotated[
    list[str],
    typer.Option(
        "--set",
        default_factory=list,
        metavar="PATH=VALUE",
        help="Change one setting, for example spec.phases.dpo.dpo.beta=0.2.",
        show_default=False,
    ),
]
Only = Annotated[
    list[str],
    typer.Option(
        "--only",
        default_factory=list,
        metavar="PHASE",
        help="Just this phase; its inputs have finished.",
        show_default=False,
    ),
]
From = Annotated[
    list[str],
    typer.Option(
        "--from",
        default_factory=list,
        metavar="PHASE",
        help="This phase and all that builds on it.",
        show_default=False,
    ),
]
Workspace = Annotated[Path, typer.Option("--workspace", metavar="DIR", help="Folder for artifacts and status.")]
Jobs = Annotated[
    int | None, typer.Option("--jobs", min=1, help="Phases that may run side by side.", show_default=False)
]
RunName = Annotated[
    str | None, typer.Option("--run", help="Name of the run; the last one unless given.", show_default=False)
]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"alignctl {version('distributed-llm-alignment')}")
        raise typer.Exit


@app.callback()
def _options(
    wanted: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    return


@app.command()
def run(
    file: File,
    fragment: Fragments,
    setting: Settings,
    only: Only,
    start: From,
    root: Workspace = workspace.DEFAULT,
    jobs: Jobs = None,
) -> None:
    """Run a pipeline on this machine. Finished phases are reused, unfinished ones continue."""
    from controller.commands.run import Request, run_command

    raise typer.Exit(run_command(Request(file, tuple(fragment), tuple(setting), tuple(only), tuple(start), root, jobs)))


@app.command()
def validate(
    file: File,
    fragment: Fragments,
    setting: Settings,
) -> None:
    """Check a run without starting anything: fields, references, data files."""
    from controller.compose import compose, read_document
    from controller.preflight import load_run

    document = compose(read_document(file), [read_document(path) for path in fragment], setting)
    loaded = load_run(document, file.resolve().parent)
    typer.echo(f"{file}: run {loaded.name} is valid, {len(loaded.phases)} phases")


@app.command()
def plan(
    file: File,
    fragment: Fragments,
    setting: Settings,
    only: Only,
    start: From,
    root: Workspace = workspace.DEFAULT,
) -> None:
    """Say what `run` would run, what it would reuse, and why."""
    from controller.commands.look import plan_command
    from controller.commands.run import Request

    raise typer.Exit(plan_command(Request(file, tuple(fragment), tuple(setting), tuple(only), tuple(start), root)))


@app.command()
def status(root: Workspace = workspace.DEFAULT, name: RunName = None) -> None:
    """Show how far a run is."""
    from controller.commands.look import status_command

    raise typer.Exit(status_command(root, name))


@app.command()
def logs(
    phase: Annotated[
        str | None, typer.Argument(help="Phase; the running or failed one unless given.", show_default=False)
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on printing until the run ends.")] = False,
    root: Workspace = workspace.DEFAULT,
    name: RunName = None,
) -> None:
    """Print what a phase has printed."""
    from controller.commands.look import logs_command

    raise typer.Exit(logs_command(root, name, phase, follow))


@app.command()
def stop(
    root: Workspace = workspace.DEFAULT,
    timeout: Annotated[float, typer.Option("--timeout", min=0, help="Seconds to wait for work to be saved.")] = 60.0,
) -> None:
    """Stop the run in a workspace; unfinished work is saved."""
    from controller.commands.look import stop_command

    raise typer.Exit(stop_command(root, timeout))


@app.command()
def gen(
    check: Annotated[bool, typer.Option("--check", help="Write nothing; fail if a file would change.")] = False,
) -> None:
    """Write the files that are generated from the models (for developers of this project)."""
    from controller.gen.files import gen_command

    raise typer.Exit(gen_command(check))


def main() -> None:
    """Bad input ends with one line per problem and exit status 2."""
    try:
        app()
    except InvalidRun as error:
        for problem in error.problems:
            typer.secho(f"error: {problem}", fg="red", err=True)
        raise SystemExit(BAD_INPUT) from None
    except (workspace.Busy, workspace.Unusable) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise SystemExit(BAD_INPUT) from None
