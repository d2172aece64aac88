"""What follows from a run's spec, and its labels of a queue, alone is worked out once for it, and not in each look."""

from collections import OrderedDict
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from controller.api import meta
from controller.api.run import AlignmentRun

T = TypeVar("T")

KEPT = 256
"""Specs for which answers are kept, those asked about last."""


def of_spec(function: Callable[[AlignmentRun], T]) -> Callable[[AlignmentRun], T]:
    """For functions of phases, template, model, seed, suspension, backend, queue and priority, which never change in place.

    They are told by who they are: to compare two of them would take as long as the work. What is kept is held, so nobody else
    gets its place meanwhile.
    """
    known: OrderedDict[tuple[Any, ...], tuple[Any, T]] = OrderedDict()

    @wraps(function)
    def once(run: AlignmentRun) -> T:
        spec = run.spec
        held = (spec.phases, spec.template, spec.model)
        labels = map(run.metadata.labels.get, (meta.LABEL_QUEUE, meta.LABEL_QUEUE_PRIORITY))
        key = (*map(id, held), spec.seed, spec.suspend, spec.queue_priority, spec.queue_name, spec.backend, *labels)
        if key not in known:
            known[key] = held, function(run)
            if len(known) > KEPT:
                known.popitem(last=False)
        known.move_to_end(key)
        return known[key][1]

    return once
