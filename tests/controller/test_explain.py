"""`alignctl plan`: what is reused, what runs, and the reason given."""

import pytest
from builders import artifact, diamond, digests, dpo, make_run, results, reward, seen, sft

from controller.api.run import AlignmentRun
from controller.plan.explain import explain, select, unmet_inputs
from controller.plan.observed import Observed, ObservedResult, Unfinished
from controller.plan.resolve import resolve

RUN = diamond()


def finished(run: AlignmentRun, *names: str) -> dict[str, ObservedResult]:
    """Results as a phase leaves them: with its settings and inputs."""
    known = digests(run)
    return {
        p.name: ObservedResult(
            known[p.name], artifact(p.name), settings=p.spec.document(), inputs={i: artifact(i) for i in p.inputs}
        )
        for p in resolve(run)
        if p.name in names
    }


def lines(run: AlignmentRun, observed: Observed) -> dict[str, str]:
    return {plan.name: f"{plan.action}: {plan.why}" for plan in explain(run, observed)}


ALL = ("base", "dpo", "reward", "ppo")


def test_a_new_run() -> None:
    assert set(lines(RUN, seen()).values()) == {"run: not run yet"}


def test_a_finished_run() -> None:
    assert set(lines(RUN, seen(results=finished(RUN, *ALL))).values()) == {"reuse: finished, nothing changed"}


def test_a_changed_setting_is_named_and_what_follows_says_so() -> None:
    before = finished(make_run(sft("base"), dpo("dpo", "base", beta=0.1), sft("more", "dpo")), "base", "dpo", "more")
    after = make_run(sft("base"), dpo("dpo", "base", beta=0.2), sft("more", "dpo"))
    assert lines(after, seen(results=before)) == {
        "base": "reuse: finished, nothing changed",
        "dpo": "run: beta 0.1 -> 0.2",
        "more": "run: input dpo changes",
    }


def test_a_changed_seed() -> None:
    assert lines(diamond(seed=1), seen(results=finished(RUN, *ALL)))["base"] == "run: seed 0 -> 1"


def test_a_checkpoint_setting_changes_nothing() -> None:
    edited = make_run(sft("base", checkpoint={"everySteps": 7}))
    assert lines(edited, seen(results=finished(make_run(sft("base")), "base")))["base"].startswith("reuse")


def test_another_input() -> None:
    old = make_run(sft("a"), sft("b", seed=5), dpo("dpo", "a"))
    new = make_run(sft("a"), sft("b", seed=5), dpo("dpo", "b"))
    assert (
        lines(new, seen(results=finished(old, "a", "b", "dpo")))["dpo"]
        == "run: policy.phase a -> b, input b is new, input a is gone"
    )


def test_changed_data() -> None:
    known = finished(RUN, "base")["base"]
    stale = ObservedResult(known.digest, known.artifact_digest, stale="data changed: rows.jsonl")
    assert lines(RUN, seen(results={"base": stale}))["base"] == "run: data changed: rows.jsonl"


def test_unfinished_work_is_continued() -> None:
    known = digests(RUN)
    observed = Observed(
        results=finished(RUN, "base"),
        unfinished={"dpo": Unfinished(known["dpo"], 40), "reward": Unfinished("other", 9)},
    )
    assert lines(RUN, observed)["dpo"] == "continue: from the checkpoint of step 40"
    assert lines(RUN, observed)["reward"] == "run: not run yet"


def test_a_result_elsewhere_is_used_and_so_is_what_builds_on_it() -> None:
    known = digests(RUN)
    elsewhere = {known["base"]: ObservedResult(known["base"], artifact("base"), place="runs/other/base")}
    observed = Observed(elsewhere=elsewhere, results=finished(RUN, "dpo"))
    assert lines(RUN, observed)["base"] == "reuse: finished with these settings in runs/other/base"
    assert lines(RUN, observed)["dpo"] == "reuse: finished, nothing changed"


# ---------------------------------------------------------------- evaluate, package


def test_evaluation_compares_all_models_of_the_run_and_packaging_reads_everything() -> None:
    evaluate = {"name": "eval", "evaluate": {}}
    run = make_run(
        sft("base"), reward("reward", "base"), dpo("dpo", "base"), evaluate, {"name": "package", "package": {}}
    )
    by_name = {phase.name: phase for phase in resolve(run)}
    assert [m.phase for m in by_name["eval"].spec.models] == ["base", "dpo"]  # type: ignore[attr-defined]
    assert set(by_name["eval"].inputs) >= {"base", "dpo"}
    assert set(by_name["package"].inputs) == {"base", "reward", "dpo", "eval"}


# ---------------------------------------------------------------- selections


@pytest.mark.parametrize(
    ("only", "start", "expected"),
    [
        ([], [], None),
        (["dpo"], [], {"dpo"}),
        ([], ["reward"], {"reward", "ppo"}),
        (["dpo"], ["ppo"], {"dpo", "ppo"}),
        ([], ["base"], set(ALL)),
    ],
)
def test_select(only: list[str], start: list[str], expected: set[str] | None) -> None:
    assert select(RUN, only, start) == expected


def test_unmet_inputs() -> None:
    plans = explain(RUN, seen(results=results(RUN, "base")), {"ppo"})
    assert unmet_inputs(RUN, plans, {"ppo"}) == [
        "phase reward, which ppo needs, is not selected and has not finished: not run yet"
    ]
