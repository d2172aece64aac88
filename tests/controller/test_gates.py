"""Gates on metrics that a phase cannot have are refused before anything starts."""

from typing import Any

import pytest
from builders import DATA, PROMPTS, document, dpo, make_run, ppo, reward, sft

from controller.api.problems import InvalidRun
from controller.plan.check import check_run
from controller.preflight import load_run
from trainers.phases import REGISTRY

EVAL = {**DATA, "eval": DATA["train"]}
ROWS = {"data": {"rows": PROMPTS["prompts"]}}


def run_with(gate: str, phase: dict[str, Any]) -> list[str]:
    """Problems of a run whose last phase has a gate on that metric."""
    (kind,) = phase.keys() - {"name"}
    gated = {**phase, kind: {**phase[kind], "gates": [{"metric": gate, "atLeast": 0}]}}
    others = [sft("base"), reward("judge", "base"), dpo("dpo", "base")]
    return [str(problem) for problem in check_run(make_run(*others, gated))]


def evaluation(**settings: Any) -> dict[str, Any]:
    benchmarks = [{"name": "answers", "accuracy": {}}, {"name": "reward", "reward": {}}, {"name": "size", "length": {}}]
    judge = {"rewardModel": {"phase": "judge"}}
    return {"name": "last", "evaluate": {**ROWS, **judge, "benchmarks": benchmarks, **settings}}


TRACES = {"traces": {"files": "traces.jsonl"}, "onPolicyFraction": 0}
STUDENT = {"teacher": {"phase": "dpo"}, "student": {"phase": "base"}}
PHASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "sft": (sft("last", data=EVAL), "evalLoss", "evalAccuracy"),
    "sft without held-out rows": (sft("last"), "parameters", "evalLoss"),
    "reward": ({"name": "last", "reward": {"model": {"phase": "base"}, "data": EVAL}}, "evalAccuracy", "accuracy"),
    "reward without held-out rows": (reward("last", "base"), "parameters", "evalAccuracy"),
    "dpo": (dpo("last", "base", data=EVAL), "evalMargin", "rewardMean"),
    "ppo": (ppo("last", "base", "judge"), "klLast", "kl"),
    "rollout": ({"name": "last", "rollout": {"policy": {"phase": "base"}, "data": PROMPTS}}, "endedShare", "ended"),
    "distill": ({"name": "last", "distill": {**STUDENT, **TRACES}}, "offPolicyKlLast", "onPolicyKlLast"),
    "package": ({"name": "last", "package": {}}, "models", "parameters"),
    "evaluate": (evaluation(), "dpo/answers/accuracy", "judge/answers/accuracy"),
    "evaluate a benchmark": (evaluation(), "base/size/rewardCorrelation", "base/size/accuracy"),
    "evaluate without a baseline": (evaluation(), "dpo/reward/score", "dpo/reward/winRate"),
    "evaluate the baseline": (evaluation(baseline="base"), "dpo/reward/winRate", "base/reward/winRate"),
    "evaluate no latency": (
        evaluation(latency={"enabled": False}), "dpo/reward/score", "dpo/latency/tokensPerSecond",
    ),
    "evaluate latency": (evaluation(), "dpo/latency/timeToFirstTokenP50", "latency/timeToFirstTokenP50"),
    "evaluate some models": (
        evaluation(models=[{"phase": "dpo", "name": "mine"}]), "mine/reward/score", "dpo/reward/score",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PHASES)
def test_a_gate_on_what_cannot_be_is_refused(case: str) -> None:
    phase, right, wrong = PHASES[case]
    assert run_with(right, phase) == []
    (problem,) = run_with(wrong, phase)
    kind = next(key for key in phase if key != "name")
    assert problem.startswith(f'spec.phases[last].{kind}.gates[0].metric: "{wrong}" is no metric of this phase')


def test_every_type_of_phase_is_here() -> None:
    assert {entry.name for entry in REGISTRY} <= {case.split()[0] for case in PHASES}


def test_validate_says_so_and_offers_what_is_near() -> None:
    gate = {"metric": "evalLos", "atMost": 1}
    with pytest.raises(InvalidRun, match=r"metrics are: evalLoss, parameters \(did you mean evalLoss\?\)"):
        load_run(document(sft("base", data=EVAL, gates=[gate])))
