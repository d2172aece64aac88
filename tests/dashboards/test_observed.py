"""What every panel shows of real runs: each query is put to the Prometheus that watched them, and must have data."""

import re

import pytest
from monitoring.observed import Observed

from dashboards.ask import answer, values_of
from dashboards.boards import BOARDS, Query, Scope, queries

pytestmark = [pytest.mark.slow, pytest.mark.pipeline]

NOTHING = {
    # There is no GPU here.
    "gpu_utilization_ratio": "no GPU", "gpu_memory": "no GPU", "gpu_power": "no GPU", "peak_flops": "no GPU",
    'kind="device': "no GPU", "gpu_seconds_total": "no GPU", "phase_gpus": "no GPU",
    # Nothing is served beside these runs: tests/trainers/test_teacher_metrics.py.
    "trainer_teacher_": "no served teacher",
}  # fmt: skip
"""Parts of queries that have no answer on these machines, and why."""


PHASES = ("sft", "reward", "dpo", "ppo", "distill")


def scopes(name: str, observed: Observed) -> list[Scope]:
    """What a user might have chosen. A panel of failures needs a run that failed, one of what is left a run that goes on."""
    namespace, length = observed.runs.namespace, observed.end - observed.begin
    values = {
        "fleet": [{"namespace": "$__all", "state": "$__all", "search": ""}],
        "run": [
            {"namespace": namespace, "run": run, "phase": "$__all"} for run in ("quickstart", "retried", "bad")
        ],
        "compare": [
            {"namespace": namespace, "run": ["quickstart", "retried"], "phase": phase, "model": "$__all"}
            for phase in PHASES
        ],
    }  # fmt: skip
    # A trainer of the shortened quickstart is there for some seconds: a few moments of the whole may all miss it.
    ends = [observed.end, *(observed.begin + seconds for seconds in range(2, int(length), 2))]
    return [Scope(chosen, observed.begin, end, scrape=1) for end in ends for chosen in values[name]]


def excused(query: Query) -> bool:
    return any(part in query.expr for part in NOTHING)


@pytest.mark.parametrize(
    "query", [(name, q) for name in BOARDS for q in queries(name)], ids=lambda found: found[1].place
)
def test_there_is_data_where_data_must_be(observed: Observed, query: tuple[str, Query]):
    name, asked = query
    chosen = scopes(name, observed)
    shown = excused(asked) or any(answer(observed.prometheus, asked, scope).numbers for scope in chosen)
    assert shown, f"nothing for {chosen[0].fill(asked)}"


def test_the_variables_offer_what_ran(observed: Observed):
    own = scopes("run", observed)[0]
    assert observed.runs.namespace in values_of(observed.prometheus, "run", "namespace", own)
    assert {"quickstart", "bad", "retried", "queued", "suspended"} <= set(
        values_of(observed.prometheus, "run", "run", own)
    )


def test_what_is_excused_is_about_gpus_and_served_teachers_alone():
    """An excuse must not hide the rest of a dashboard."""
    every = [query for name in BOARDS for query in queries(name)]
    free = [query for query in every if excused(query)]
    assert all(re.search(r"gpu|flops|device|trainer_teacher_", query.expr) for query in free)
    assert len(free) < len(every) / 5
