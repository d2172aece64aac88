"""One trajectory: every way of sharing the work gives what one process does, phase by phase."""

import pytest
from distributed.agreement import agree
from distributed.cells import KINDS, TRAINED, WAYS
from distributed.compare import answers, exported, final_metrics, losses

REDUCED = {
    "ddp": ("reward", "dpo"),
    "fsdp": ("sft", "ppo", "package"),
    "zero 3": ("distill", "rollout", "evaluate"),
}
"""What is tried always; the whole with ``make test-distributed``."""


@pytest.mark.parametrize("name", REDUCED)
def test_some_phases_are_what_one_process_makes_of_them(name, run_way):
    check(name, run_way, REDUCED[name])


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name, way in WAYS.items() if not way.bf16])
def test_every_phase_is_what_one_process_makes_of_it(name, run_way):
    check(name, run_way)


@pytest.mark.distributed
@pytest.mark.parametrize("name", [name for name, way in WAYS.items() if way.bf16])
def test_in_bf16_it_is_the_same_but_for_that(name, run_way):
    ours, theirs = run_way(WAYS[name]), run_way(WAYS[name].alone)
    for kind in TRAINED:
        agree(WAYS[name], kind, ours[kind], theirs[kind])


@pytest.mark.distributed
def test_in_bf16_a_split_model_has_the_same_first_loss(run_way):
    """Embeddings and heads are gathered as they are held, and a fresh model's norms are 1 in any type."""
    kinds, way = ("sft", "reward"), WAYS["fsdp in bf16"]
    ours, theirs = run_way(way, kinds), run_way(way.alone, kinds)
    for kind in kinds:
        assert losses(ours[kind])[1] == pytest.approx(losses(theirs[kind])[1], rel=1e-6), kind


def check(name, run_way, kinds=KINDS):
    ours, theirs = run_way(WAYS[name], kinds), run_way(WAYS[name].alone)
    for kind, found in ours.items():
        if kind == "package":
            check_package(found, ours)
        else:
            check_phase(name, kind, found, theirs[kind])


def check_phase(name, kind, found, expected):
    agree(WAYS[name], kind, found, expected)
    assert final_metrics(found) == pytest.approx(final_metrics(expected), rel=1e-4, abs=1e-5), kind
    if (found / "model").exists():
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
