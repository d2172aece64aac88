"""Attempts after one that ran out of memory: fewer responses side by side than that one had."""

import os

from trainers.contract import HALVINGS_VARIABLE
from trainers.spec import Sampling


def times_halved() -> int:
    """How often the settings are halved that this attempt was given."""
    return int(os.environ.get(HALVINGS_VARIABLE, "0"))


def of_responses(sampling: Sampling, count: int, halved: int) -> Sampling:
    """For ``count`` responses of one process: attempts that ran out of memory had no more of them side by side than there are."""
    most = max(1, count >> halved)
    return sampling.model_copy(update={"batch_size": most}) if halved and most < sampling.batch_size else sampling
