"""A machine whose clock is wrong, and an API server whose answers have dates."""

from dataclasses import dataclass, field
from email.utils import formatdate

import pytest

from controller.clock import ANSWERS, Clock

TRUE = 1_767_225_600.0
HOUR = 3600.0


@dataclass
class Machine:
    """Time goes on by ``pass_``; its clock is ``ahead``, which somebody may set, and counts from its start beside it."""

    ahead: float = 0.0
    passed: float = 0.0
    clock: Clock = field(init=False)

    def __post_init__(self) -> None:
        self.clock = Clock(lambda: TRUE + self.passed + self.ahead, lambda: 77.0 + self.passed)

    def answer(self, seconds: float = 0.1, wrong_by: float = 0.0) -> None:
        self.passed += seconds
        self.clock.dated(formatdate(int(TRUE + self.passed + wrong_by), usegmt=True), seconds)

    @property
    def error(self) -> float:
        """Of the time that is gone by."""
        return abs(self.clock.now().timestamp() - (TRUE + self.passed))


@pytest.mark.parametrize("ahead", [5 * HOUR, -5 * HOUR, 40.0, -40.0, 0.0, 2.0])
def test_time_goes_by_the_api_servers_clock(ahead: float) -> None:
    machine = Machine(ahead)
    machine.answer()
    assert machine.error <= 2 + abs(ahead) * (abs(ahead) < 5)
    machine.passed += 3 * HOUR
    assert machine.error <= 2 + abs(ahead) * (abs(ahead) < 5), "also when nothing is asked for long"


def test_a_clock_that_is_set_right_or_wrong_meanwhile_moves_nothing() -> None:
    machine = Machine(5 * HOUR)
    machine.answer()
    machine.ahead = 0.0
    assert machine.error <= 2
    machine.ahead = -HOUR
    assert machine.error <= 2


def test_one_server_of_several_with_a_wrong_clock_is_outvoted() -> None:
    machine = Machine()
    for number in range(3 * ANSWERS):
        machine.answer(wrong_by=HOUR if number % 3 == 1 else 0.0)
    assert machine.error <= 2


@pytest.mark.parametrize(("date", "seconds"), [("", 0.1), ("yesterday", 0.1), ("Thu, 01 Jan 9999 00:00:00 GMT", 30.0)])
def test_what_says_nothing_changes_nothing(date: str, seconds: float) -> None:
    machine = Machine()
    machine.clock.dated(date, seconds)
    assert (machine.clock.ahead, machine.error < 1) == (0.0, True)


def test_it_is_told_once_and_when_it_is_over(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    machine = Machine(2 * HOUR)
    for _ in range(3):
        machine.answer()
    machine.ahead = 0.0
    for _ in range(3):
        machine.answer()
    assert [record.message for record in caplog.records] == [
        "this machine's clock is 7200 s ahead of the API server's, which is taken instead",
        "this machine's clock agrees with the API server's again",
    ]
