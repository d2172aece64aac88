"""PromQL: what every panel, variable and annotation asks is understood by Prometheus itself, data or none."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from monitoring.prometheus import Prometheus, promtool

from dashboards.ask import answer
from dashboards.boards import BOARDS, Query, Scope, queries

NOW = time.time()
SOME = {
    "fleet": {"namespace": "$__all", "state": ["Running", "Failed"], "search": "a.b"},
    "run": {"namespace": "team-a", "run": "helpful", "phase": ["sft", "dpo-2"]},
    "compare": {"namespace": ["team-a", "team-b"], "run": ["one", "other"], "phase": "dpo", "model": "$__all"},
}
EVERY = [(name, query) for name in BOARDS for query in queries(name)]
RANGES = {"5m": 300, "7d": 7 * 86400}


def scope(name: str, seconds: float = 6 * 3600) -> Scope:
    return Scope(SOME[name], NOW - seconds, NOW)


def check(folder: Path, expressions: dict[str, str]) -> None:
    """promtool reads them as the expressions of rules."""
    rules = [
        {"record": f"query_{i}", "expr": expr, "labels": {"place": place}}
        for i, (place, expr) in enumerate(expressions.items())
    ]
    path = folder / "rules.json"
    path.write_text(json.dumps({"groups": [{"name": "queries", "rules": rules}]}))
    promtool("check", "rules", str(path))


@pytest.mark.parametrize("seconds", RANGES.values(), ids=RANGES)
def test_promtool_understands_every_query(tmp_path: Path, seconds: float):
    expressions = {query.place: scope(name, seconds).fill(query) for name, query in EVERY}
    assert len(expressions) == len(EVERY) > 100
    assert not any("$" in expr.replace('"$1"', "").replace('"$2"', "") for expr in expressions.values())
    check(tmp_path, expressions)


def test_a_wrong_query_would_be_found(tmp_path: Path):
    with pytest.raises(AssertionError, match="parse error"):
        check(tmp_path, {"a": "up", "b": "sum by (run (up)"})


def test_values_are_filled_in_as_grafana_does():
    query = Query(
        "test", 'a{x=~"$namespace", y=~".*${search:regex}.*"}[$__range:$__interval] * ${__interval_ms}', "instant"
    )
    filled = Scope({"namespace": ["a.b", "c"], "search": "d+"}, 0, 3600).fill(query)
    assert filled == r'a{x=~"(a\\.b|c)", y=~".*d\\+.*"}[3600s:15s] * 15000'
    assert Scope({"namespace": "$__all", "search": ""}, 0, 3600).fill(query).startswith('a{x=~".*", y=~".*.*"}')
    with pytest.raises(KeyError, match=r"\$namespace is no variable"):
        Scope({}, 0, 3600).fill(query)


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    running = Prometheus(tmp_path_factory.mktemp("empty"))
    yield running
    running.stop()


@pytest.mark.parametrize(("name", "query"), EVERY, ids=lambda value: value if isinstance(value, str) else value.place)
def test_without_data_there_is_no_error_and_nothing_is_made_up(empty: Prometheus, name: str, query: Query):
    assert answer(empty, query, scope(name)).rows == []
