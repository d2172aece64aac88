"""Rights that the operator turns out to lack, as a newer image does beside an older chart.

What it can do without it does, and says once for each right what is missed by it. What it cannot do without is tried again, as
anything that the API server refuses.
"""

import logging
import re

from controller.kube.answers import ApiError
from controller.kube.calls import Call

logger = logging.getLogger(__name__)

REFUSED = re.compile(r'[\w.-]+(?: "[^"]*")? is forbidden: User "[^"]*" cannot \w+ resource ')
"""Of an authorizer; quotas and admission forbid in other words. (k8s.io/apiserver, pkg/endpoints/handlers/responsewriters.)"""


class Rights:
    def __init__(self) -> None:
        self._told: set[Call] = set()

    def lacks(self, error: ApiError, without: str) -> bool:
        """Whether the answer is that a right is missing. ``without``: what becomes of it."""
        if error.status != 403 or not REFUSED.match(error.message):
            return False
        if error.call not in self._told:
            self._told.add(error.call)
            told = "the operator lacks a right that its version has by its chart (RBAC), and goes on without"
            logger.warning("%s: %s: %s", told, without, error)
        return True
