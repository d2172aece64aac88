"""The operator: `python -m controller`, in a pod or with --kubeconfig."""

import asyncio
import logging
import os
import sys
import uuid
from pathlib import Path
from typing import Annotated

import typer

from controller.api.backend import BackendName
from controller.api.workspace import Workspace
from controller.backends.cluster.settings import USER, Settings

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

Namespaces = Annotated[
    list[str],
    typer.Option(
        "--namespace",
        envvar="WATCH_NAMESPACES",
        default_factory=list,
        help="Namespace to watch; several are given one by one. All unless given.",
        show_default=False,
    ),
]
Kubeconfig = Annotated[
    Path | None, typer.Option(help="Run outside a cluster with these credentials.", show_default=False)
]
Image = Annotated[
    str | None,
    typer.Option(envvar="DEFAULT_TRAINER_IMAGE", help="Trainers' image of runs that name none.", show_default=False),
]
Claim = Annotated[
    str | None,
    typer.Option(envvar="DEFAULT_WORKSPACE_CLAIM", help="Workspace of runs that name none.", show_default=False),
]
Queue = Annotated[
    str | None,
    typer.Option(envvar="DEFAULT_QUEUE", help="Kueue LocalQueue of runs that name none.", show_default=False),
]
DefaultBackend = Annotated[
    BackendName,
    typer.Option(envvar="DEFAULT_BACKEND", help="Kind of job of runs that name none."),
]
User = Annotated[
    int,
    typer.Option(
        envvar="TRAINER_USER",
        min=0,
        help="User and group of trainers' pods; 0: those that the cluster gives.",
    ),
]
MetricsReaders = Annotated[
    str | None,
    typer.Option(
        envvar="METRICS_READERS",
        help="Give each run a NetworkPolicy. Who may read trainers' metrics, as a NetworkPolicy has it, in JSON; []: everybody.",
        show_default=False,
    ),
]
LargestRuns = Annotated[
    str | None,
    typer.Option(
        envvar="LARGEST_RUNS",
        help='Most that a run takes at once, in JSON: [{"namespaces": ["a"], "most": {"nodes": 8, "nvidia.com/gpu": 64}}].',
        show_default=False,
    ),
]
LeaseNamespace = Annotated[str, typer.Option(envvar="POD_NAMESPACE", help="Namespace of the Lease.")]
Port = Annotated[int, typer.Option(envvar="PORT", help="Port of /healthz, /readyz and /metrics.")]
Workers = Annotated[int, typer.Option(envvar="WORKERS", min=1, help="Runs that are looked at side by side.")]
WatchdogSeconds = Annotated[float, typer.Option(envvar="WATCHDOG_SECONDS", help="Between two checks of the watches.")]
LogFormat = Annotated[str, typer.Option(envvar="LOG_FORMAT", help="json or text.")]
LogLevel = Annotated[str, typer.Option(envvar="LOG_LEVEL", help="debug, info, warning or error.")]


@app.command()
def operator(
    namespace: Namespaces,
    kubeconfig: Kubeconfig = None,
    default_image: Image = None,
    default_claim: Claim = None,
    default_queue: Queue = None,
    default_backend: DefaultBackend = BackendName.PYTORCHJOB,
    trainer_user: User = USER,
    metrics_readers: MetricsReaders = None,
    largest_runs: LargestRuns = None,
    lease_namespace: LeaseNamespace = "default",
    port: Port = 8080,
    workers: Workers = 8,
    watchdog_seconds: WatchdogSeconds = 60.0,
    log_format: LogFormat = "json",
    log_level: LogLevel = "info",
) -> None:
    """Watch AlignmentRuns and carry them out as PyTorchJobs or TrainJobs."""
    from controller.operator import largest, peers
    from controller.operator.app import Options, main
    from controller.operator.defaults import Defaults
    from controller.operator.garbage import collect_seldom
    from controller.operator.login import NoCredentials, login_of
    from controller.operator.logs import configure

    configure(log_format, log_level)
    try:
        readers, largest_of = peers.peers(metrics_readers), largest.largest_runs(largest_runs)
        login = login_of(kubeconfig)
    except (peers.BadPeers, largest.BadLargest, NoCredentials) as error:
        typer.secho(f"error: {error}", fg="red", err=True)
        raise typer.Exit(2) from None
    workspace = Workspace(claim_name=default_claim) if default_claim else None
    options = Options(
        identity=f"{os.environ.get('POD_NAME', os.uname().nodename)}-{uuid.uuid4().hex[:8]}",
        lease_namespace=lease_namespace,
        namespaces=tuple(namespace),
        pods=Settings(default_image or None, trainer_user or None, readers, largest_of),
        defaults=Defaults(workspace, default_queue or None, default_image or None, default_backend),
        port=port,
        workers=workers,
        watchdog_seconds=watchdog_seconds,
    )
    logging.getLogger(__name__).info("watching %s", ", ".join(namespace) or "all namespaces")
    collect_seldom()
    sys.exit(asyncio.run(main(options, login)))


if __name__ == "__main__":
    app()
