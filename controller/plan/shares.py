"""Requests and limits that no container can have.

As `validateContainerResourceRequirements` of Kubernetes has it (k8s.io/kubernetes, pkg/apis/core/validation): devices and huge
pages are never shared out twice, so they are asked for exactly as they are limited.
"""

from collections.abc import Iterator, Mapping
from fractions import Fraction

from controller.api.problems import Problem
from controller.api.quantities import number
from controller.api.syntax import HUGE_PAGES, is_extended
from controller.api.template import Resources

Quantities = Mapping[str, str]


def share_problems(path: str, resources: Resources) -> Iterator[Problem]:
    requests, limits = resources.requests, resources.limits
    for kind, given in (("requests", requests), ("limits", limits)):
        for name, quantity in given.items():
            if said := _amount_problem(name, quantity):
                yield Problem(f"{path}.{kind}[{name}]", said)
    for name, quantity in requests.items():
        if said := _request_problem(name, quantity, limits.get(name)):
            yield Problem(f"{path}.requests[{name}]", said)
    yield from _lonely_pages(path, {**limits, **requests})


def _amount_problem(name: str, quantity: str) -> str:
    if is_extended(name) and number(quantity).denominator != 1:
        return f'"{quantity}" is not a whole number, as of all devices'
    if not name.startswith(HUGE_PAGES):
        return ""
    size = _page_size(name)
    if not size:
        return f'"{name.removeprefix(HUGE_PAGES)}" is no size of pages: hugepages-2Mi or hugepages-1Gi'
    return "" if number(quantity) % size == 0 else f'"{quantity}" is not a multiple of the size of these pages'


def _page_size(name: str) -> Fraction:
    """0 where it is none."""
    try:
        return number(name.removeprefix(HUGE_PAGES))
    except ValueError:
        return Fraction(0)


def _request_problem(name: str, asked: str, limit: str | None) -> str:
    if is_extended(name) or name.startswith(HUGE_PAGES):
        if limit is None:
            return f'"{asked}" needs a limit of as much: say it in limits, the request may be left out'
        return "" if number(asked) == number(limit) else f'"{asked}" is not the limit, "{limit}": leave the request out'
    if limit is not None and number(asked) > number(limit):
        return f'"{asked}" is more than the limit, "{limit}": at most as much'
    return ""


def _lonely_pages(path: str, given: Quantities) -> Iterator[Problem]:
    pages = next((name for name in given if name.startswith(HUGE_PAGES)), None)
    if pages and not given.keys() & {"cpu", "memory"}:
        yield Problem(path, f"{pages} needs cpu or memory beside it")
