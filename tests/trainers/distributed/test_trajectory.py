"""One trajectory: every way of sharing the work gives what one process does, phase by phase."""

import pytest
from distributed.cells import KINDS, TRAINED, WAYS
from distributed.compare import answers, difference, exported, final_metrics, losses

REDUCED = {
    "ddp": ("reward", "dpo"),
    "fsdp": ("sft", "ppo", "package"),
    "zero 3": ("distill", "rollout", "evaluate"),
}
"""What is tried always; the whole with ``make test-distributed``."""

BOUND = 1e-5
"""Relative, in fp32. Sums that are split otherwise round otherwise."""

BF16_LOSS, BF16_WEIGHTS = 2e-2, 2e-2
"""Of losses, and relative of all weights together, after four steps of arithmetic in bf16."""


@pytest.mark.parametrize("name", REDUCED)
def test_some_phases_are_what_one_process_makes_of_them(name, run_way):
    check(run_way(WAYS[name], REDUCED[name]), run_way(WAYS[name].alone))


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name, way in WAYS.items() if not way.bf16])
def test_every_phase_is_what_one_process_makes_of_it(name, run_way):
    check(run_way(WAYS[name]), run_way(WAYS[name].alone))


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name, way in WAYS.items() if way.bf16])
def test_in_bf16_it_is_the_same_but_for_that(name, run_way):
    check_bf16(name, run_way, KINDS)


@pytest.mark.distributed
def test_in_bf16_a_split_model_has_the_same_first_loss(run_way):
    """Embeddings and heads are gathered as they are held, and a fresh model's norms are 1 in any type."""
    kinds, way = ("sft", "reward"), WAYS["fsdp in bf16"]
    ours, theirs = run_way(way, kinds), run_way(way.alone, kinds)
    for kind in kinds:
        assert losses(ours[kind])[1] == pytest.approx(losses(theirs[kind])[1], rel=1e-6), kind


def check_bf16(name, run_way, kinds):
    """Where phases sample, a response that rounds otherwise is another one: their first loss is the same."""
    ours, theirs = run_way(WAYS[name], kinds), run_way(WAYS[name].alone, kinds)
    for kind in filter(TRAINED.__contains__, kinds):
        steps = 1 if kind in ("ppo", "distill") else 4
        found, expected = ([loss for _, loss in sorted(losses(run[kind]).items())][:steps] for run in (ours, theirs))
        assert found == pytest.approx(expected, rel=BF16_LOSS, abs=BF16_LOSS), kind
        if steps > 1:
            assert difference(ours[kind], theirs[kind]) < BF16_WEIGHTS, kind


def check(ours, theirs):
    for kind, found in ours.items():
        expected = theirs[kind]
        if kind == "package":
            check_package(found, ours)
            continue
        assert losses(found) == pytest.approx(losses(expected), rel=BOUND, abs=1e-6), kind
        assert final_metrics(found) == pytest.approx(final_metrics(expected), rel=1e-4, abs=1e-5), kind
        if (found / "model").exists():
            assert difference(found, expected) < BOUND, kind
            assert exported(found / "model").keys() == exported(expected / "model").keys(), kind
        if kind == "rollout":
            assert answers(found) == answers(expected)


def check_package(package, phases):
    """The report, and the models that the other phases have left."""
    models = {kind: phase / "model" for kind, phase in phases.items() if (phase / "model").exists()}
    assert (package / "report.html").exists()
    assert final_metrics(package) == {"models": len(models)}
    for kind, model in models.items():
        weights = "model.safetensors"
        assert exported(package / "models" / kind)[weights] == exported(model)[weights]
