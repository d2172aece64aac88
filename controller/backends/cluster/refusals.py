"""What it means that the API server did not make an object of ours.

Admission may deny with any code: a webhook chooses its own, and a ValidatingAdmissionPolicy says 422 unless it names a reason. So
it is known by its words, which the API server puts before all that a webhook or a policy says; names of objects come after them
or in quotation marks. (k8s.io/apiserver, pkg/admission: plugin/webhook/errors, plugin/policy; pkg/util/webhook.)
"""

import re

from controller.kube.answers import ApiError

INVALID = (400, 413, 422)
"""Answers about the object itself, which asking again does not change."""
FORBIDDEN = 403
"""A quota is full, or a right is missing."""

DENIED = re.compile(
    r'admission webhook "[^"]*" denied the request'
    r"""|(?:[\w.-]+ "[^"]*" is (?:forbidden|invalid): )?\w*[Pp]olicy ['"][^'"]*['"](?: with binding '[^']*')? denied request"""
)
UNANSWERED = re.compile(r"(?:Internal error occurred: )?failed calling webhook ")


def waits(error: ApiError) -> bool:
    """Nothing has failed: it may not be made now, and is asked for again until it may."""
    return error.status == FORBIDDEN or DENIED.match(error.message) is not None


def refused(error: ApiError, what: str) -> str:
    """What is said of an object that will never do as it is; empty where it may be asked for again."""
    return f"the API server refused {what}: {error.message}" if error.status in INVALID and not waits(error) else ""


def is_unanswered(error: ApiError) -> bool:
    """Somebody has to be asked who is not there."""
    return UNANSWERED.match(error.message) is not None
