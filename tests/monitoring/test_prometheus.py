"""The Prometheus of the tests: queries, reloading, and that it ends with its owner."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster.processes import wait_for

from monitoring.prometheus import EMPTY, Prometheus, QueryFailed, promtool

TESTS = Path(__file__).parents[1]


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Prometheus]:
    running = Prometheus(tmp_path / "prometheus")
    yield running
    running.stop()


def test_a_reload_adds_a_target_whose_data_can_be_queried(prometheus: Prometheus):
    assert prometheus.targets() == []
    itself = {"job_name": "itself", "static_configs": [{"targets": [prometheus.address]}]}
    begin = time.time()
    prometheus.reload({**EMPTY, "scrape_configs": [itself]})
    up = 'up{job="itself"}'
    wait_for(lambda: len(prometheus.query(f"count_over_time({up}[1m]) >= 3")), 30, "three scrapes")
    assert prometheus.query(up) == [({"__name__": "up", "job": "itself", "instance": prometheus.address}, 1.0)]
    assert prometheus.query(up, time=begin - 60) == []
    assert prometheus.query("1 + 1") == [({}, 2.0)]
    (line,) = prometheus.query_range(up, begin, time.time(), step=1)
    assert {value for _, value in line.points} == {1.0}
    assert prometheus.series(up) == [line.labels]
    assert prometheus.metadata()["process_cpu_seconds_total"]["type"] == "counter"
    (target,) = prometheus.targets()
    assert (target["health"], target["lastError"]) == ("up", "")


def test_a_wrong_query_and_a_wrong_configuration_are_told(prometheus: Prometheus):
    with pytest.raises(QueryFailed, match="unclosed left parenthesis"):
        prometheus.query("rate(up")
    with pytest.raises(AssertionError, match="scrape_confs"):
        prometheus.reload({"scrape_confs": []})


def test_promtool_finds_what_is_wrong_with_a_page():
    with pytest.raises(AssertionError, match='counter metrics should have "_total" suffix'):
        promtool("check", "metrics", text="# HELP steps Steps.\n# TYPE steps counter\nsteps 1\n")


def test_it_ends_with_the_process_that_started_it(tmp_path: Path):
    program = f"""
import os, pathlib, signal
from monitoring.prometheus import Prometheus
running = Prometheus(pathlib.Path({str(tmp_path)!r}))
print(running._children.running["prometheus"].pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=TESTS, capture_output=True, text=True, timeout=60, check=False
    )
    pid = int(done.stdout)
    wait_for(lambda: not Path(f"/proc/{pid}/exe").exists(), 10, "Prometheus has ended")
