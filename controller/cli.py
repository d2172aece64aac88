"""`alignctl`: one resource, run on one machine or applied to a cluster."""

import shlex
import signal
from pathlib import Path
from typing import Annotated

import typer

from controller import runs_folder
from controller.api.problems import InvalidRun
from controller.commands import where
from controller.commands.cluster.errors import ClusterError
from controller.commands.say import say
from trainers import __version__

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
Anew = Annotated[
    list[str],
    typer.Option(
        "--anew",
        default_factory=list,
        metavar="PHASE",
        help="Run this phase and all that builds on it anew, although they have finished; '*' is all of them. Nothing is lost.",
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

# Commands that look at what runs somewhere: in a workspace on this machine, or in a cluster.
LocalWorkspace = Annotated[
    Path | None,
    typer.Option(
        "--workspace",
        metavar="DIR",
        help=f"Folder of a run on this machine; {runs_folder.DEFAULT} unless given.",
        show_default=False,
    ),
]
CLUSTER = where.panel()
Context = Annotated[
    str | None,
    typer.Option(
        "--context",
        metavar="CONTEXT",
        help="Context of the kubeconfig; the current one unless given.",
        rich_help_panel=CLUSTER,
        show_default=False,
    ),
]
Namespace = Annotated[
    str | None,
    typer.Option(
        "-n",
        "--namespace",
        metavar="NAMESPACE",
        help="Namespace; the context's unless given.",
        rich_help_panel=CLUSTER,
        show_default=False,
    ),
]
Kubeconfig = Annotated[
    Path | None,
    typer.Option(
        "--kubeconfig",
        metavar="FILE",
        help="KUBECONFIG or ~/.kube/config unless given.",
        rich_help_panel=CLUSTER,
        show_default=False,
    ),
]


def _print_version(wanted: bool) -> None:
    if wanted:
        say(f"alignctl {__version__}")
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
    anew: Anew,
    root: Workspace = runs_folder.DEFAULT,
    jobs: Jobs = None,
) -> None:
    """Run a pipeline on this machine. Finished phases are reused, unfinished ones continue."""
    from controller.commands.run import Request, run_command

    asked = Request(file, tuple(fragment), tuple(setting), tuple(only), tuple(start), root, anew=tuple(anew), jobs=jobs)
    raise typer.Exit(run_command(asked))


@app.command()
def validate(
    file: File,
    fragment: Fragments,
    setting: Settings,
) -> None:
    """Check a run without starting anything: fields, references, data files; and whether it fits the memory it states."""
    from controller.commands.sizes import fewer_rows, machine_of_servers, misfits, sizes_here
    from controller.compose import compose, read_document
    from controller.plan.sizes import states_memory
    from controller.preflight import load_run

    document = compose(read_document(file), [read_document(path) for path in fragment], setting)
    loaded = load_run(document, file.resolve().parent)
    say(f"{file}: run {loaded.name} is valid, {len(loaded.phases)} phases")
    # Sizes are an estimate: a warning, and no error.
    known = states_memory(loaded) or machine_of_servers(loaded) is not None
    sizes = sizes_here(loaded, file.resolve().parent) if known else {}
    for remark in (*misfits(sizes.values()), *fewer_rows(sizes.values())):
        say(f"warning: {remark}", color="yellow", err=True)


@app.command()
def plan(
    file: File,
    fragment: Fragments,
    setting: Settings,
    only: Only,
    start: From,
    anew: Anew,
    root: Workspace = runs_folder.DEFAULT,
) -> None:
    """Say what `run` would run, what it would reuse, and why."""
    from controller.commands.plan import plan_command
    from controller.commands.run import Request

    asked = Request(file, tuple(fragment), tuple(setting), tuple(only), tuple(start), root, anew=tuple(anew))
    raise typer.Exit(plan_command(asked))


@app.command()
def status(
    watch: Annotated[
        bool, typer.Option("-w", "--watch", help="Go on until the run ends: with 0 if it succeeded, else 1.")
    ] = False,
    root: LocalWorkspace = None,
    name: RunName = None,
    context: Context = None,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Show how far a run is, in a workspace or in a cluster."""
    from controller.commands.cluster.status import cluster_status
    from controller.commands.status import status_command

    place = where.choose(root, context, namespace, kubeconfig)
    if isinstance(place, where.Place):
        _shows(watch)
        raise typer.Exit(cluster_status(place, name, watch))
    _shows(watch)
    raise typer.Exit(status_command(place, name, watch))


@app.command()
def logs(
    phase: Annotated[
        str | None, typer.Argument(help="Phase; the running or failed one unless given.", show_default=False)
    ] = None,
    follow: Annotated[
        bool, typer.Option("-f", "--follow", help="Go on, over further attempts, until the run ends.")
    ] = False,
    attempt: Annotated[
        int | None, typer.Option("--attempt", min=1, help="The newest one unless given.", show_default=False)
    ] = None,
    root: LocalWorkspace = None,
    name: RunName = None,
    pod: Annotated[
        int, typer.Option("--pod", min=0, help="Index of the pod; pod 0 has rank 0.", rich_help_panel=CLUSTER)
    ] = 0,
    context: Context = None,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Print what a phase has printed, in a workspace or in a cluster."""
    from controller.commands.cluster.logs import cluster_logs
    from controller.commands.logs import logs_command

    place = where.choose(root, context, namespace, kubeconfig)
    if isinstance(place, where.Place):
        _shows(follow)
        raise typer.Exit(cluster_logs(place, name, phase, attempt, pod, follow))
    where.only_in_a_cluster("--pod", pod)
    _shows(follow)
    raise typer.Exit(logs_command(place, name, phase, attempt, follow))


@app.command()
def stop(
    timeout: Annotated[
        float | None,
        typer.Option(
            "--timeout", min=0, help="Seconds to wait for work to be saved.", show_default="60, in a cluster 600"
        ),
    ] = None,
    root: LocalWorkspace = None,
    name: Annotated[
        str | None,
        typer.Option("--run", help="Name of the run, if several go on.", rich_help_panel=CLUSTER, show_default=False),
    ] = None,
    context: Context = None,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Stop the run in a workspace, or one in a cluster; unfinished work is saved."""
    from controller.commands.cluster.stop import cluster_stop
    from controller.commands.stop import stop_command

    place = where.choose(root, context, namespace, kubeconfig)
    if isinstance(place, where.Place):
        raise typer.Exit(cluster_stop(place, name, 600.0 if timeout is None else timeout))
    where.only_in_a_cluster("--run", name)
    raise typer.Exit(stop_command(place, 60.0 if timeout is None else timeout))


@app.command()
def resume(
    root: LocalWorkspace = None,
    name: Annotated[
        str | None,
        typer.Option(
            "--run", help="Name of the run, if several are stopped.", rich_help_panel=CLUSTER, show_default=False
        ),
    ] = None,
    context: Context = None,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Let a stopped run in a cluster go on. (On this machine, `run FILE` does.)"""
    from controller.commands.cluster.stop import cluster_resume

    place = where.choose(root, context, namespace, kubeconfig)
    if isinstance(place, where.Place):
        raise typer.Exit(cluster_resume(place, name))
    say(f"a run in a workspace continues with: alignctl run FILE --workspace {place}", err=True)
    raise typer.Exit(BAD_INPUT)


RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Name of the run.", show_default=False)]


@app.command()
def retry(
    name: RunArgument,
    start: Annotated[
        list[str],
        typer.Option(
            "--from",
            default_factory=list,
            metavar="PHASE",
            help="Run this phase and all that builds on it anew, although they may have finished.",
            show_default=False,
        ),
    ],
    root: LocalWorkspace = None,
    context: Context = None,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Let failed phases of a run in a cluster try again, from what they have saved. (On this machine, `run FILE` does.)"""
    _ask_again(where.choose(root, context, namespace, kubeconfig), name, start)


@app.command()
def rerun(
    name: RunArgument,
    root: LocalWorkspace = None,
    context: Context = None,
    namespace: Namespace = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Run all phases of a run in a cluster anew; what they had left is kept. (On this machine, `run FILE --anew '*'` does.)"""
    from controller.plan.again import ALL

    _ask_again(where.choose(root, context, namespace, kubeconfig), name, [ALL])


def _ask_again(place: Path | where.Place, name: str, phases: list[str]) -> None:
    from controller.commands.cluster.retry import cluster_retry

    if isinstance(place, where.Place):
        raise typer.Exit(cluster_retry(place, name, phases))
    anew = "".join(f" --anew {shlex.quote(phase)}" for phase in phases)
    say(f"a run in a workspace tries again with: alignctl run FILE{anew} --workspace {place}", err=True)
    raise typer.Exit(BAD_INPUT)


Holding = Annotated[
    str,
    typer.Option("--workspace", metavar="DIR", help="Folder (a mounted claim too), or s3://bucket/prefix."),
]


@app.command()
def runs(
    name: Annotated[
        str | None, typer.Argument(metavar="RUN", help="Show this run's phases.", show_default=False)
    ] = None,
    root: Holding = str(runs_folder.DEFAULT),
) -> None:
    """List what a workspace holds, also of runs that were deleted."""
    from controller.commands.runs import runs_command

    raise typer.Exit(runs_command(root, name))


@app.command()
def history(root: Holding = str(runs_folder.DEFAULT)) -> None:
    """Write a page for people about what a workspace holds: history.html in the workspace."""
    from controller.commands.history import history_command

    raise typer.Exit(history_command(root))


@app.command("import")
def import_(
    name: Annotated[
        str,
        typer.Argument(
            metavar="FORMAT",
            help="alpaca, sharegpt, messages, preference-messages, hh or prompt-completion.",
            show_default=False,
        ),
    ],
    source: Annotated[
        str,
        typer.Argument(help="A file or a glob in quotes: JSONL, or one list in .json; also .gz.", show_default=False),
    ],
    target: Annotated[Path, typer.Argument(help="The JSONL file to write, .jsonl or .jsonl.gz.", show_default=False)],
    column: Annotated[
        list[str],
        typer.Option(
            "--column",
            default_factory=list,
            metavar="KEY=COLUMN",
            help="The source's column for a key of the format, for example instruction=question.",
            show_default=False,
        ),
    ],
    skip: Annotated[bool, typer.Option("--skip", help="Leave malformed rows out instead of stopping.")] = False,
) -> None:
    """Write rows of a known format as JSONL that every phase reads."""
    from controller.commands.import_rows import import_command

    raise typer.Exit(import_command(name, source, target, column, skip))


def _shows(until_ctrl_c: bool) -> None:
    """What is shown until a Ctrl-C gives the terminal back as it was: from here on that is an exception."""
    if until_ctrl_c:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def main() -> None:
    """Bad input ends with one line per problem and exit status 2; a cluster that cannot help, with one line and 1."""
    try:
        app(prog_name=where.program())
    except InvalidRun as error:
        for problem in error.problems:
            _say_error(problem)
        raise SystemExit(BAD_INPUT) from None
    except (runs_folder.Busy, runs_folder.Unusable) as error:
        _say_error(error)
        raise SystemExit(BAD_INPUT) from None
    except ClusterError as error:
        _say_error(error)
        raise SystemExit(1) from None


def _say_error(text: object) -> None:
    """Names and values in it are a document's, which a stranger may have written."""
    say(f"error: {text}", color="red", err=True)
