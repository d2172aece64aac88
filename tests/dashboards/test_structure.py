"""What every dashboard and panel must have, and that the three belong together."""

import itertools
import json
import re
from typing import Any

import pytest

from controller.operator.metrics import METRICS as OPERATOR_METRICS
from dashboards.boards import BOARDS, ROOT, VARIABLE, panels, queries
from generate.dashboards import dashboard_files
from trainers.metrics import METRICS as TRAINER_METRICS

EACH = pytest.mark.parametrize("name", sorted(BOARDS))
KINDS = {"timeseries", "stat", "table", "state-timeline", "bargauge", "trend"}
"""Panels of a current Grafana. `graph`, `singlestat` and `table-old` are gone from it."""
TABLES = {metric.name: metric for metric in (*OPERATOR_METRICS, *TRAINER_METRICS)}


def all_panels() -> list[tuple[str, Any]]:
    return [(name, panel) for name, board in BOARDS.items() for panel in panels(board)]


def test_there_are_three_with_fixed_uids():
    assert {name: board["uid"] for name, board in BOARDS.items()} == {
        "fleet": "alignment-fleet",
        "run": "alignment-run",
        "compare": "alignment-compare",
    }


def test_the_shipped_files_are_those_that_are_generated():
    assert {path: (ROOT / path).read_text() for path in dashboard_files()} == dashboard_files()


@pytest.mark.parametrize(
    ("name", "panel"), all_panels(), ids=lambda value: value if isinstance(value, str) else value["title"]
)
def test_a_panel_says_what_it_shows_in_which_unit_and_what_its_absence_means(name: str, panel: Any):
    defaults = panel["fieldConfig"]["defaults"]
    assert panel["type"] in KINDS
    assert panel["title"]
    assert len(panel["description"]) > 10
    assert panel["description"].endswith(".")
    assert defaults["unit"]
    assert defaults["noValue"]
    assert panel["targets"]
    assert all(
        target["datasource"]["uid"] == "${datasource}" for target in (panel, *panel["targets"]) if target is not panel
    )
    assert panel["datasource"]["uid"] == "${datasource}"
    if panel["type"] in ("timeseries", "bargauge", "state-timeline") and len(panel["targets"]) > 1:
        assert all(target["legendFormat"] for target in panel["targets"])


@EACH
def test_numbers_and_places_are_unique(name: str):
    board = BOARDS[name]
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(set(numbers)) == len(numbers)
    titles = [panel["title"] for panel in panels(board)]
    assert len(set(titles)) == len(titles), "a title twice"
    for one, other in itertools.combinations([panel["gridPos"] for panel in board["panels"]], 2):
        apart = (
            one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        )  # fmt: skip
        assert apart, (one, other)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in board["panels"])


@EACH
def test_only_variables_that_exist_are_used(name: str):
    board = BOARDS[name]
    variables = {variable["name"] for variable in board["templating"]["list"]}
    builtin = {"__interval", "__interval_ms", "__rate_interval", "__range", "__url_time_range", "__data"}
    text = json.dumps({**board, "templating": [v["query"] for v in board["templating"]["list"]]})
    used = {m["name"] or m["plain"] for m in VARIABLE.finditer(text)} | set(re.findall(r"\$\{(\w+)\.", text))
    assert used - builtin <= variables
    assert variables <= used | {"datasource"}, "a variable that nothing uses"


def links(value: Any) -> list[str]:
    if isinstance(value, dict):
        own = [value["url"]] if isinstance(value.get("url"), str) else []
        return own + [url for inner in value.values() for url in links(inner)]
    return [url for inner in value for url in links(inner)] if isinstance(value, list) else []


def test_links_lead_to_the_others_with_variables_that_those_have():
    uids = {board["uid"]: name for name, board in BOARDS.items()}
    seen = set()
    for name, board in BOARDS.items():
        for url in links(board):
            path, _, query = url.partition("?")
            target = uids[path.removeprefix("/d/")]
            variables = {variable["name"] for variable in BOARDS[target]["templating"]["list"]}
            assert (
                set(re.findall(r"var-(\w+)=", query)) | set(re.findall(r"\$\{(\w+):queryparam\}", query)) <= variables
            )
            seen.add((name, target))
    assert {("fleet", "run"), ("run", "compare"), ("run", "fleet"), ("compare", "run")} <= seen


@EACH
def test_a_link_in_a_table_uses_columns_of_that_table(name: str):
    for panel in panels(BOARDS[name]):
        named = [t["options"]["renameByName"] for t in panel.get("transformations", []) if t["id"] == "organize"]
        for url in links(panel):
            assert set(re.findall(r"__data\.fields\.(\w+)", url)) <= set(named[0].values()), panel["title"]


# -- the tables of metrics


def names(expr: str) -> set[str]:
    """Metrics of the suite in an expression, a histogram's parts as the histogram."""
    found = re.findall(r"\balignment_(?:operator|trainer)_\w+", expr)
    return {re.sub(r"_(bucket|count|sum)$", "", one) if one not in TABLES else one for one in found}


def used(name: str) -> set[str]:
    return {metric for query in queries(name) for metric in names(query.expr)}


@EACH
def test_every_metric_is_one_of_the_tables(name: str):
    assert used(name) <= TABLES.keys()


@EACH
def test_a_selector_uses_labels_that_the_metric_has(name: str):
    target = {"namespace", "pod"}
    common = {"run", "phase", "type", "rank"}
    for query in queries(name):
        for metric, selector in re.findall(
            r"\b(alignment_\w+?)(?:_bucket|_count|_sum)?\{([^}]*(?:\$\{[^}]*\}[^}]*)*)\}", query.expr
        ):
            known = set(TABLES[metric].labels) | target | (common if "_trainer_" in metric else set())
            assert set(re.findall(r"(\w+)(?:=~|!~|!=|=)\"", selector)) <= known, query


def test_every_metric_of_the_tables_is_shown():
    shown = {
        metric
        for name in BOARDS
        for panel in panels(BOARDS[name])
        for t in panel["targets"]
        for metric in names(t["expr"])
    }
    assert TABLES.keys() == shown
