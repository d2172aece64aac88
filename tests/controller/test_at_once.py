"""What a run can take of a cluster at once, against all sets of phases there are, and what is said where it is too much."""

from itertools import combinations

import pytest
from builders import START, after, dpo, job, make_run, reward, seen, sft, started, with_status
from hypothesis import given
from hypothesis import strategies as st
from test_ownership import Shelf, look

from controller.api import meta
from controller.api.run import AlignmentRun
from controller.backends.cluster.settings import Settings
from controller.operator.largest import BadLargest, largest_runs
from controller.plan.at_once import heaviest, size_problems
from controller.plan.decide import Decision, decide
from controller.plan.graph import dependents
from controller.plan.observed import JobState, ObservedJob

GPU = "nvidia.com/gpu"
SIDE_BY_SIDE = "spec.phases: one, two, reward may run at once"


def tried(weights: dict[str, int], graph: dict[str, tuple[str, ...]]) -> int:
    """By trying every set."""
    after = {name: dependents(graph, [name]) for name in graph}
    sets = (chosen for size in range(len(weights) + 1) for chosen in combinations(weights, size))
    return max(
        sum(weights[name] for name in chosen)
        for chosen in sets
        if not any(b in after[a] for a in chosen for b in chosen)
    )


@st.composite
def graphs(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, tuple[str, ...]]]:
    names = [f"p{i}" for i in range(draw(st.integers(1, 8)))]
    graph = {
        name: tuple(draw(st.sets(st.sampled_from(names[:i] or names[:1])))) if i else () for i, name in enumerate(names)
    }
    return {name: draw(st.integers(0, 9)) for name in names}, graph


@given(graphs())
def test_it_is_the_heaviest_set_that_can_run_side_by_side(
    case: tuple[dict[str, int], dict[str, tuple[str, ...]]],
) -> None:
    weights, graph = case
    amount, chosen = heaviest(weights, graph)
    assert amount == sum(weights[name] for name in chosen) == tried(weights, graph)
    after = {name: dependents(graph, [name]) for name in graph}
    assert not any(b in after[a] for a in chosen for b in chosen)


def test_the_largest_run_there_can_be_is_weighed_at_once() -> None:
    names = [f"p{i}" for i in range(meta.MAX_PHASES)]
    graph = {name: tuple(names[max(0, i - 7) : max(0, i - 3)]) for i, name in enumerate(names)}
    amount, chosen = heaviest({name: 4096 - 37 * i for i, name in enumerate(names)}, graph)
    assert amount >= 4 * 4096 - 37 * 6
    assert len(chosen) >= 4


def wide(**spec: object) -> AlignmentRun:
    """base, then two dpo and a reward beside each other."""
    gpus = {"resources": {"limits": {GPU: 8}}}
    after = (dpo("one", "base"), dpo("two", "base"), reward("reward", "base"))
    return make_run(sft("base"), *({**phase, "template": gpus} for phase in after), template={"nodes": 3}, **spec)


@pytest.mark.parametrize(
    ("most", "said"),
    [
        ({"nodes": 9, GPU: 72}, None),
        ({"nodes": 8}, f"{SIDE_BY_SIDE}, with 9 nodes in all; a run in this namespace takes at most 8 at once"),
        ({GPU: 71}, f"{SIDE_BY_SIDE}, with 72 nvidia.com/gpu in all; "),
        ({"nodes": 2}, SIDE_BY_SIDE),
        ({"example.com/tpu": 0}, None),
    ],
)  # fmt: skip
def test_phases_that_may_run_side_by_side_are_counted_together(most: dict[str, int], said: str | None) -> None:
    found = [str(problem) for problem in size_problems(wide(), most)]
    assert len(found) == (said is not None)
    assert not said or found[0].startswith(said)


def test_one_phase_alone_is_named() -> None:
    [problem] = size_problems(make_run(sft("base"), template={"nodes": 5}), {"nodes": 4})
    assert str(problem) == "spec.phases: base takes 5 nodes; a run in this namespace takes at most 4 at once"


def test_what_is_suspended_takes_nothing() -> None:
    assert not list(size_problems(wide(suspend=True), {"nodes": 1}))
    entries = [dict(phase, suspend=phase["name"] != "base") for phase in (sft("base"), dpo("one", "base"))]
    assert not list(size_problems(make_run(*entries, template={"nodes": 3}), {"nodes": 3}))


def test_the_run_says_so_and_what_runs_goes_on() -> None:
    run = wide(workspace={"claimName": "w"}).model_copy()
    run = run.model_copy(update={"metadata": run.metadata.model_copy(update={"uid": "run-1", "namespace": "small"})})
    allowed = Settings("i:1", largest_runs={"large": {"nodes": 8}})
    assert look(Shelf(), run, allowed).problems == ()
    told = look(Shelf(), run, Settings("i:1", largest_runs={"small": {"nodes": 8}})).problems
    refused = decide(run, seen(problems=told), START)
    accepted = refused.status.condition(meta.ACCEPTED)
    assert accepted is not None
    assert (accepted.status, accepted.reason, refused.actions) == ("False", meta.INVALID_SPEC, ())
    assert "with 9 nodes in all" in accepted.message


def test_the_least_of_what_is_said_of_a_namespace_holds() -> None:
    text = '[{"namespaces": ["a", "b"], "most": {"nodes": 8}}, {"namespaces": ["b"], "most": {"nodes": 9, "x/y": 1}}]'
    assert largest_runs(text) == {"a": {"nodes": 8}, "b": {"nodes": 8, "x/y": 1}}
    assert largest_runs(None) == {}


@pytest.mark.parametrize(
    "text", ["x", "{}", '[{"namespaces": ["a"]}]', '[{"namespaces": ["a"], "most": {"nodes": "8"}}]']
)
def test_what_an_operator_cannot_read_is_told(text: str) -> None:
    with pytest.raises(BadLargest, match="--largest-runs"):
        largest_runs(text)


# ---------------------------------------------------------------- what goes on while a run is edited


def with_gpus(name: str, gpus: int, **more: object) -> dict[str, object]:
    return {**sft(name), "template": {"resources": {"limits": {GPU: gpus}}}, **more}


def looks(most: dict[str, int], *steps: tuple[AlignmentRun, tuple[ObservedJob, ...]]) -> list[Decision]:
    decisions: list[Decision] = []
    for at, (run, jobs) in enumerate(steps):
        known = with_status(run, decisions[-1]) if decisions else run
        decisions.append(decide(known, seen(*jobs, most=most), after(at)))
    return decisions


OLD = make_run(with_gpus("old", 8))
EDITS = {
    "taken out": make_run(with_gpus("new", 8)),
    "suspended": make_run(with_gpus("old", 8, suspend=True), with_gpus("new", 8)),
    "asks for less": make_run(with_gpus("old", 1), with_gpus("new", 7)),
}


@pytest.mark.parametrize("edit", EDITS)
def test_what_a_phase_had_before_an_edit_counts_until_its_attempt_has_ended(edit: str) -> None:
    """Edit after edit a run could have had any number of GPUs at once, each within the limit."""
    trains, run = job(OLD, "old", running_since=START), EDITS[edit]
    *_, waits, still, goes = looks(
        {GPU: 8, "nodes": 9}, (OLD, ()), (OLD, (trains,)), (run, (trains,)), (run, (trains,)),
        (run, () if edit != "asks for less" else (job(OLD, "old", state=JobState.FAILED),)),
    )  # fmt: skip
    assert (started(waits), started(still)) == ([], [])
    new = waits.status.phase_status("new")
    assert new is not None
    assert new.message == (
        f"waits: 8 {GPU} are still taken by attempts that have not ended, and a run in this namespace takes at most 8 at once"
    )
    assert "new-1" in started(goes)
    free = looks({}, (OLD, ()), (OLD, (trains,)), (run, (trains,)))
    assert started(free[-1]) == ["new-1"]


def test_what_begins_in_one_look_counts_together() -> None:
    """Of an operator whose limit was another when the run was looked at last; the run as a whole is refused then."""
    run = make_run(*(with_gpus(name, 8) for name in ("one", "two", "three")))
    assert started(decide(run, seen(most={GPU: 16}), START)) == ["one-1", "two-1"]


def test_an_attempt_says_what_it_takes_until_it_has_ended() -> None:
    resources = {"limits": {GPU: 8, "memory": "9E"}, "requests": {"memory": "9E"}}
    run = make_run(sft("old"), template={"nodes": 2, "resources": resources})
    asked = decide(run, seen(), START)
    assert asked.status.phases[0].attempts[0].takes == {GPU: 16, "memory": 10**15}
    over = decide(with_status(run, asked), seen(job(run, "old", state=JobState.FAILED)), after(1))
    assert over.status.phases[0].attempts[0].takes == {}
