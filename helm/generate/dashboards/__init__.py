"""Grafana's dashboards, made from the tables of metrics: *Fleet*, *Run* and *Compare*."""

from generate.dashboards import compare, fleet, run
from generate.dashboards.board import as_json

FOLDER = "helm/alignment-operator/files/dashboards"


def dashboard_files() -> dict[str, str]:
    """Path in the repository to content."""
    boards = {"fleet": fleet.board(), "run": run.board(), "compare": compare.board()}
    return {f"{FOLDER}/{name}.json": as_json(board) for name, board in boards.items()}
