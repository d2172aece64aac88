"""The dashboards at a thousand runs: answers come in time, and panels have no more rows and lines than can be read."""

import time
from collections.abc import Iterator

import pytest
from monitoring.prometheus import Prometheus

from dashboards.ask import answer, values_of
from dashboards.boards import BOARDS, Query, Scope, panel_queries, panels
from dashboards.thousand_runs import RUNS, make, name_of

pytestmark = pytest.mark.slow

SAMPLES = 2_500_000
"""That one query may look at. Prometheus manages about a million a second on one core, and refuses 50 million."""
LINES, BARS, ROWS = 30, 40, 100
MOST = {"timeseries": LINES, "stat": 10, "bargauge": BARS, "table": ROWS, "state-timeline": LINES, "trend": 20 * 10}
CHOSEN = [name_of(number) for number in range(1, 251, 25)]
CASES = [
    (name, panel["type"], query)
    for name, board in BOARDS.items()
    for panel in panels(board)
    for query in panel_queries(name, panel)
]


@pytest.fixture(scope="module")
def end() -> float:
    return float(int(time.time()) // 240 * 240)


@pytest.fixture(scope="module")
def crowded(tmp_path_factory: pytest.TempPathFactory, end: float) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("crowded")
    make(folder / "data", end)
    running = Prometheus(folder)
    yield running
    running.stop()


def scope(name: str, end: float) -> Scope:
    values = {
        "fleet": {"namespace": "$__all", "state": "$__all", "search": ""},
        "run": {**CHOSEN[0], "phase": "$__all"},
        "compare": {"namespace": "$__all", "run": [one["run"] for one in CHOSEN], "phase": "sft", "model": "$__all"},
    }
    return Scope(values[name], end - 3500, end)


@pytest.mark.parametrize(
    ("name", "kind", "query"), CASES, ids=lambda value: value.place if isinstance(value, Query) else value
)
def test_an_answer_is_quick_and_can_be_read(crowded: Prometheus, end: float, name: str, kind: str, query: Query):
    got = answer(crowded, query, scope(name, end))
    assert got.samples < SAMPLES
    assert len(got.rows) <= MOST[kind]


def test_the_data_are_those_of_a_thousand_runs_and_tables_are_full(crowded: Prometheus, end: float):
    (count,) = crowded.query("count(alignment_operator_run_state)", time=end)
    assert count.value == RUNS
    table = next(panel for panel in panels(BOARDS["fleet"]) if panel["title"].startswith("Runs (the newest"))
    shown = [answer(crowded, query, scope("fleet", end)).rows for query in panel_queries("fleet", table)]
    assert {len(rows) for rows in shown[:3]} == {ROWS}
    newest = {name_of(number)["run"] for number in range(ROWS)}
    assert all({row.labels["run"] for row in rows} <= newest for rows in shown), "a column for runs that are not shown"


def test_the_search_and_the_state_narrow_the_table(crowded: Prometheus, end: float):
    table = next(panel for panel in panels(BOARDS["fleet"]) if panel["title"].startswith("Runs (the newest"))
    first = next(panel_queries("fleet", table))
    one = Scope({"namespace": "$__all", "state": "$__all", "search": "0777"}, end - 3500, end)
    assert [row.labels["run"] for row in answer(crowded, first, one).rows] == ["run-0777"]
    failed = Scope({"namespace": ["team-4", "team-14"], "state": ["Failed", "Queued"], "search": ""}, end - 3500, end)
    rows = answer(crowded, first, failed).rows
    assert {row.labels["state"] for row in rows} == {"Failed"}
    assert {row.labels["namespace"] for row in rows} == {"team-4", "team-14"}


def test_variables_offer_what_there_is(crowded: Prometheus, end: float):
    own = scope("run", end)
    assert len(values_of(crowded, "run", "namespace", own)) == 25
    assert len(values_of(crowded, "run", "run", own)) == RUNS / 25
    assert len(values_of(crowded, "run", "phase", own)) == 6
    assert values_of(crowded, "compare", "model", scope("compare", end), "^([^/]+)/.+") == ["distill"]
