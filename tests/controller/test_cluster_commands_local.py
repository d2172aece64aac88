"""What the commands that look into clusters do in a workspace."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_local_runs import SLOW, Bench, steps_of, wait_for


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    bench = Bench(tmp_path)
    yield bench
    for process in bench.survivors():
        process.kill()


def test_watch_ends_with_the_run(bench: Bench) -> None:
    process = bench.start(
        **{**SLOW, "FAKE_STEPS": "3000"}
    )  # it lasts until it is killed, however slowly the watcher starts
    wait_for(lambda: steps_of(bench, "base") >= 1)
    watcher = bench.start("status", "--watch")
    assert watcher.stdout
    assert "base: started" in watcher.stdout.readline()
    process.kill()
    process.communicate()
    output, _ = watcher.communicate(timeout=20)
    assert watcher.returncode == 1
    assert "run test: interrupted; run it again to continue (0/3 phases" in output
    wait_for(lambda: bench.survivors() == [])
    assert bench.run()[0] == 0
    code, output = bench.run("status", "--watch")
    assert code == 0
    assert re.search(r"^run test: succeeded \(3/3 phases, (100%, )?[\dhm]+s\)$", output, re.M)


def test_logs_of_an_earlier_attempt(bench: Bench) -> None:
    settings = [
        "--set",
        "spec.failurePolicy.backoff.initialSeconds=0.1",
        "--set",
        "spec.failurePolicy.retries.infrastructure=1",
    ]
    bench.run("run", "run.yaml", *settings, FAKE_FAIL_BASE="Infrastructure")
    first, second = bench.log("base", 1), bench.log("base", 2)
    assert bench.run("logs", "base", "--attempt", "1") == (0, first)
    assert bench.run("logs", "base", "--attempt", "1", "--follow") == (0, first)
    assert bench.run("logs", "base") == (0, second)
    assert "base: no log of attempt 3; attempts are: 1, 2" in bench.run("logs", "base", "--attempt", "3")[1]
