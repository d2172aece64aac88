"""Going on over an API server's restart and over credentials that expire."""

import time
from collections.abc import Callable
from typing import TypeVar

from controller.commands.cluster.client import Cluster
from controller.commands.cluster.errors import ClusterError
from controller.commands.say import say

T = TypeVar("T")

PATIENCE_SECONDS = 120.0
PAUSE_SECONDS = 2.0


def patiently(
    cluster: Cluster, call: Callable[[], T], known: bool = True, clock: Callable[[], float] = time.monotonic
) -> T:
    """The call's answer, asked for again while the cluster may just be away; its error if that lasts.

    A cluster that is not ``known`` to exist has to answer something at once: its address may be wrong.
    """
    end, failures, renewed = clock() + PATIENCE_SECONDS, 0, False
    while True:
        try:
            return call()
        except ClusterError as error:
            if error.code == 401 and known and not renewed:
                renewed = True
                cluster.renew()
                continue
            if not error.passing or clock() > end or not (known or error.code):
                raise
            failures += 1
            if failures == 2:  # the first may well be over by now
                say(f"{error}; trying again", err=True)
        time.sleep(PAUSE_SECONDS)
