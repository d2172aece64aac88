"""Runs read from their documents. A spec changes with its generation only, and what follows from it is worked out once."""

from collections import OrderedDict

from controller.api.run import AlignmentRun, RunSpec
from controller.kube.resources import Object
from controller.plan.once import KEPT

Which = tuple[str, int]
"""UID and generation."""


class Specs:
    def __init__(self) -> None:
        self._known: OrderedDict[Which, RunSpec] = OrderedDict()

    def read(self, document: Object) -> AlignmentRun:
        """Raises ValidationError."""
        which = (document["metadata"].get("uid", ""), document["metadata"].get("generation", 0))
        known = self._known.get(which)
        run = AlignmentRun.model_validate({**document, "spec": known} if known else document)
        self._known[which] = run.spec
        self._known.move_to_end(which)
        if len(self._known) > KEPT:
            self._known.popitem(last=False)
        return run
