"""Names of jobs: no two of a namespace alike, and short enough for all that the Training Operator makes of them."""

import re
from string import ascii_lowercase, digits

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from controller.api.run import PHASE_NAME_LENGTH, RUN_NAME_LENGTH
from controller.plan.job import NAME_LIMIT, job_name

LAST_WORKER = "-worker-4095"
"""Of as many nodes as a run may have."""
SERVICE = re.compile("[a-z]([-a-z0-9]*[a-z0-9])?")


def label(longest: int, letters: str = "-" + ascii_lowercase + digits) -> st.SearchStrategy[str]:
    return st.text(letters, min_size=1, max_size=longest).filter(lambda s: s[0] != "-" and s[-1] != "-")


few = "-ar1x"
"""Few letters make names that look alike; r is what a digit at the beginning once got before it, x begins a mark."""
attempts = st.one_of(st.integers(1, 12), st.integers(1, 10**9))
triples = st.one_of(
    st.tuples(label(4, few), label(4, few), attempts),
    st.tuples(label(RUN_NAME_LENGTH), label(PHASE_NAME_LENGTH), attempts),
    st.tuples(label(3).map(lambda s: (s + "b" * 60)[:RUN_NAME_LENGTH]), label(PHASE_NAME_LENGTH), attempts),
)


@given(triples, triples)
@example(("1a", "p", 1), ("r1a", "p", 1))
@example(("a-b", "c", 1), ("a", "b-c", 1))
@example(("a", "b-1", 1), ("a", "b", 11))
@example(("a" * 40, "x" * 29 + "1", 1), ("a" * 40, "x" * 29 + "2", 1))
@example(("1" + "a" * 39, "p" * 30, 1), ("r1" + "a" * 38, "p" * 30, 1))
@settings(max_examples=150, deadline=None)
def test_two_attempts_never_share_a_name(one: tuple[str, str, int], other: tuple[str, str, int]) -> None:
    assume(one != other)
    assert job_name(*one) != job_name(*other)


@given(triples)
@settings(max_examples=100, deadline=None)
def test_no_name_can_be_had_by_naming_a_run_and_a_phase_after_its_parts(one: tuple[str, str, int]) -> None:
    """As somebody would who wants the name of another one's job."""
    name = job_name(*one)
    for cut in (m.start() for m in re.finditer("-", name)):
        run, _, rest = name[:cut], "-", name[cut + 1 :]
        phase, _, number = rest.rpartition("-")
        if phase and number.isdigit() and (run, phase, int(number)) != one and not number.startswith("0"):
            assert job_name(run, phase, int(number)) != name


@given(triples)
@settings(max_examples=100, deadline=None)
def test_names_are_short_and_may_name_a_service(one: tuple[str, str, int]) -> None:
    name = job_name(*one)
    assert len(name) <= NAME_LIMIT
    assert len(name + LAST_WORKER) <= 63
    assert SERVICE.fullmatch(name + LAST_WORKER)
    assert job_name(*one) == name


@pytest.mark.parametrize(
    ("run", "phase", "start"),
    [("run", "sft", "run-sft-3"), ("my-run", "sft", "my-run-sft-3-x"), ("1a", "p", "r1a-p-3-x")],
)
def test_names_are_for_people(run: str, phase: str, start: str) -> None:
    assert job_name(run, phase, 3).startswith(start)
