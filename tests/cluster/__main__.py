"""`make cluster-up` and friends: `PYTHONPATH=tests python -m cluster <command> --help`."""

import argparse
import sys
from pathlib import Path

from cluster import build, demo, images, launch, requirements
from cluster.assets import BINARIES, Assets, locate


def main() -> int:
    arguments = _parser().parse_args()
    try:
        return arguments.run(arguments) or 0
    except (build.CannotBuild, launch.StartFailed, demo.NotPossible) as error:
        print(error, file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cluster", description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("build", help="build the binaries of some tiers, by default of all")
    command.add_argument("tiers", nargs="*", choices=[[], *BINARIES])
    command.set_defaults(run=_build)
    command = commands.add_parser("up", help="start real nodes; they stay until `down`")
    command.add_argument("--nodes", type=int, default=2)
    command.set_defaults(run=_up)
    commands.add_parser("down", help="end them, and remove what a killed cluster left").set_defaults(run=_down)
    command = commands.add_parser(
        "demo", help="start them with the operator, a workspace and the trainers' environment"
    )
    command.add_argument("--nodes", type=int, default=2)
    command.set_defaults(run=_demo)
    _add_image(commands.add_parser("image", help="write an image archive from folders"))
    return parser


def _add_image(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", help="with a tag: alignment-trainer:test")
    command.add_argument("out", type=Path)
    command.add_argument("--base", default="python", help="pause, python, an archive, or ''")
    command.add_argument("--layer", action="append", default=[], metavar="FOLDER:TARGET")
    command.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    command.add_argument("--user", default="")
    command.add_argument("--workdir", default="")
    command.add_argument("--entrypoint", nargs="+", default=[])
    command.set_defaults(run=_image)


def _build(arguments: argparse.Namespace) -> None:
    build.build_all(arguments.tiers)


def _up(arguments: argparse.Namespace) -> None:
    running, assets = _start(arguments.nodes)
    print(f"export KUBECONFIG={running.info['kubeconfig']} PATH={assets.root}/bin:$PATH")


def _start(nodes: int) -> tuple[launch.Running, Assets]:
    """Real nodes that outlive this process."""
    if reason := requirements.missing("node"):
        raise launch.StartFailed(reason)
    assets = build.ensure("node")
    images.ensure_bases(assets)
    return launch.start("node", nodes, kept=True), assets


def _down(_: argparse.Namespace) -> None:
    print("The cluster is gone." if launch.stop_kept() else "There was no cluster.")


def _demo(arguments: argparse.Namespace) -> None:
    demo.check()
    print(demo.install(*_start(arguments.nodes)))


def _image(arguments: argparse.Namespace) -> None:
    pairs = (text.partition(":") for text in arguments.layer)
    layers = [images.Layer(Path(folder), target or "/") for folder, _, target in pairs]
    base = locate().image(arguments.base) if arguments.base in ("pause", "python") else Path(arguments.base)
    images.write_image(
        arguments.name, layers, arguments.out, base if arguments.base else None, user=arguments.user, workdir=arguments.workdir,
        env=dict(variable.split("=", 1) for variable in arguments.env), entrypoint=arguments.entrypoint,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
