"""Progress in a page of metrics: what trainers serve, and what anybody else may."""

import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import generate_latest

from controller.backends.cluster.fetch import LIMIT
from controller.backends.cluster.page import LARGEST, LONGEST_SECONDS, MOST_STEPS, WANTED, progress_of
from trainers.meter import Meter
from trainers.metrics import METRICS, PREFIX
from trainers.phase_dir import PhaseDir
from trainers.spec import Tracking

SINCE = datetime(2026, 1, 1, tzinfo=UTC)
NOW = SINCE + timedelta(hours=1)


def page(**figures: object) -> bytes:
    return "".join(f'{PREFIX}{name}{{rank="0"}} {value}\n' for name, value in figures.items()).encode()


def read(text: bytes):
    return progress_of(text, SINCE, NOW)


def test_the_names_are_trainers():
    assert {PREFIX + name for name in WANTED} <= {metric.name for metric in METRICS}


def test_the_rate_is_that_of_all_processes():
    """Each knows its own part; they share the work evenly."""
    info = b'alignment_trainer_info{device="cpu",processes="4",rank="0",version="1"} 1\n'
    assert read(page(step=1, tokens_per_second=100)).tokens_per_second == 100
    assert read(page(step=1, tokens_per_second=100) + info).tokens_per_second == 400
    assert read(page(step=1) + info).tokens_per_second is None


def test_before_the_first_step_a_pod_has_been_at_work_since_it_runs():
    assert read(page(step=0)).updated_at == SINCE
    assert read(b"python_info 1\n") is None


SENSELESS = {
    "a step of 1e300": (page(step="1e300"), None),
    "a step below none": (page(step=-1), None),
    "a step that is no number": (page(step="NaN"), None),
    "endless steps": (page(step="+Inf"), None),
    "half a line": (page(step=12)[:-2], None),
    "more saved than there is": (page(step=12, checkpoint_step=13), {"step": 12, "checkpoint_step": 0}),
    "more done than there is": (page(step=12, total_steps=3), {"step": 12, "total_steps": 0}),
    "endless work": (page(step=1, total_steps="1e300"), {"total_steps": 0}),
    "no loss": (page(step=1, loss="NaN"), {"loss": None}),
    "a loss out of reach": (page(step=1, loss=-1e200), {"loss": None}),
    "a rate below none": (page(step=1, tokens_per_second=-5), {"tokens_per_second": None}),
    "a rate that many processes make too large": (
        page(step=1, tokens_per_second=1e15) + b'alignment_trainer_info{processes="999999"} 1\n',
        {"tokens_per_second": None},
    ),
    "an end in a million years": (page(step=1, eta_seconds=3e13), {"eta_seconds": None}),
    "the year 9999": (page(step=1, last_step_timestamp_seconds=253402300799), {"updated_at": NOW}),
    "after the end of time": (page(step=1, last_step_timestamp_seconds=1e300), {"updated_at": NOW}),
    "before time began": (page(step=1, last_step_timestamp_seconds=-1e18), {"updated_at": SINCE}),
    "before the pod began": (page(step=1, last_step_timestamp_seconds=1), {"updated_at": SINCE}),
    "underscores": (page(step="1_0"), None),
    "other digits": (page(step="١"), None),
    "a name that only begins so": (b"alignment_trainer_steps 4\n", None),
    "a comment": (b"# alignment_trainer_step 4\n", None),
}


@pytest.mark.parametrize(("text", "expected"), SENSELESS.values(), ids=SENSELESS)
def test_numbers_make_sense(text: bytes, expected: dict[str, object] | None):
    found = read(text)
    assert (found if expected is None else {name: getattr(found, name) for name in expected}) == expected


NAMES = st.sampled_from(WANTED).map(lambda name: (PREFIX + name).encode())
LABELS = st.sampled_from([b"", b'{rank="0"}', b'{processes="3"}', b'{processes="99999999999"}', b'{a="}"}', b"{"])
VALUES = (
    st.floats().map(lambda value: repr(value).encode()) | st.integers().map(lambda n: b"%d" % n) | st.binary(max_size=9)
)
LINES = st.tuples(NAMES, LABELS, st.sampled_from([b" ", b"", b"\t"]), VALUES, st.sampled_from([b"\n", b"\r\n", b""]))
PAGES = st.lists(LINES.map(b"".join) | st.binary(max_size=30)).map(b"".join)


@given(PAGES | st.binary(), st.datetimes(timezones=st.just(UTC)))
def test_any_bytes_are_numbers_that_make_sense_or_nothing(text: bytes, since: datetime):
    found = progress_of(text, since, NOW)
    if found is None:
        return
    assert 0 <= found.step <= MOST_STEPS
    assert found.total_steps == 0 or found.step <= found.total_steps <= MOST_STEPS
    assert found.loss is None or abs(found.loss) <= LARGEST
    assert found.tokens_per_second is None or 0 < found.tokens_per_second <= LARGEST
    assert found.eta_seconds is None or 0 < found.eta_seconds <= LONGEST_SECONDS
    assert found.updated_at is not None
    assert found.updated_at <= max(since, NOW)
    assert found.updated_at >= min(since, NOW) - timedelta(seconds=1)


SLOW = {
    "braces": b"alignment_trainer_step{" + b"} 1" * 340 + b"\n",
    "digits": b"alignment_trainer_step{" + (b"} " + b"1" * 32) * 29 + b"x\n",
    "begins": b"alignment_trainer_last_step_timestamp_second\n",
    "one line": b"alignment_trainer_step{" + b"} 1" * LIMIT,
    "lines": b"\n",
}


@pytest.mark.parametrize("line", SLOW.values(), ids=SLOW)
def test_no_page_takes_long_to_read(line: bytes):
    text = (line * LIMIT)[:LIMIT] if len(line) < 1000 else line[:LIMIT]
    started = time.process_time()
    read(text)
    assert time.process_time() - started < 0.1


# ---------------------------------------------------------------- what the trainers really serve


@pytest.fixture
def meter(tmp_path: Path) -> Iterator[Meter]:
    made = Meter(PhaseDir(tmp_path), {"run": "r", "phase": "p", "type": "sft", "rank": "0"}, 0, Tracking())
    yield made
    made.close()


def served(meter: Meter):
    return progress_of(generate_latest(meter.registry), SINCE, datetime.now(UTC))


def test_a_trainers_own_page(meter: Meter):
    meter.begin(0, 40)
    for step in (1, 2):
        meter.count(tokens=1000, samples=4)
        time.sleep(0.01)
        meter.log(step, loss=2.5, learning_rate=1e-4)
    found = served(meter)
    assert found is not None
    assert (found.step, found.total_steps, found.loss) == (2, 40, 2.5)
    assert found.tokens_per_second == pytest.approx(meter._rate)
    assert found.eta_seconds is not None
    assert found.eta_seconds > 0
    assert found.updated_at is not None
    assert abs((datetime.now(UTC) - found.updated_at).total_seconds()) < 5


def test_a_trainer_that_has_not_finished_a_step_has_no_progress(meter: Meter):
    assert served(meter) is None


def test_a_loss_that_is_no_number_is_left_out(meter: Meter):
    meter.begin(0, 4)
    meter.log(1, loss=float("nan"), grad_norm=float("inf"))
    found = served(meter)
    assert found is not None
    assert (found.step, found.loss) == (1, None)


def test_the_last_step_leaves_no_time(meter: Meter):
    meter.begin(3, 4)
    meter.log(4, loss=1.0)
    found = served(meter)
    assert found is not None
    assert (found.step, found.eta_seconds) == (4, None)
