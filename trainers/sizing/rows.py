"""How many responses a device's memory holds side by side, where that are fewer than `sampling.batchSize` allows."""

from collections.abc import Callable
from typing import TypeVar

from trainers.phases.distill.spec import DistillSpec
from trainers.phases.ppo.spec import PpoSpec
from trainers.smaller import of_responses
from trainers.spec import PhaseSpec, Sampling, find_models, shrunk

P = TypeVar("P", bound=PhaseSpec)


def halvings_that_fit(spec: P, fits: Callable[[P], bool]) -> int | None:
    """How often its rows are halved until it fits; None where one row does not, or rows are not what takes too much."""
    return next((times for times in range(most_rows(spec).bit_length()) if fits(with_fewer_rows(spec, times))), None)


def halvings_that_help(spec: P, total: Callable[[P], int]) -> int:
    """As often as the phase then needs less: where it never fits by its plan, which may be off by some."""
    totals = [total(with_fewer_rows(spec, times)) for times in range(most_rows(spec).bit_length())]
    return totals.index(min(totals)) if totals else 0


def of_steps(spec: P, world: int, halved: int) -> P:
    """A phase that samples in each of its steps, whose responses may be fewer than ``sampling.batchSize`` allows."""
    sampling = None
    if isinstance(spec, PpoSpec | DistillSpec):
        sampling = of_responses(spec.sampling, -(-spec.batch_size // world), halved)
    return spec if sampling is None else spec.model_copy(update={"sampling": sampling})


def with_fewer_rows(spec: P, halvings: int) -> P:
    return shrunk(spec, halvings, Sampling)


def most_rows(spec: PhaseSpec) -> int:
    """Of responses that the phase's own engine samples; 0 where it samples none."""
    own = (sampling.batch_size for _, sampling in find_models(spec, Sampling) if sampling.engine == "own")
    return max(own, default=0)
