"""Pods that mean harm, and an operator that looks after their run and after others."""

import time

import psutil
from driver import Driver, OperatorProcess, manifest, sft
from hostile import hostile_pods

from trainers.contract import DEFAULT_METRICS_PORT

NASTY = "\x1b]0;owned\x07\x1b[31mred\x1b[0m\r\nline two"
HARM = ("gzip_bomb", "gigabyte", "endless", "million_series", "byte_a_second", "endless_headers", "silent")
MORE_MB = 40


def test_the_operator_goes_on_among_them(driver: Driver, operator: OperatorProcess):
    assert operator.process is not None
    process = psutil.Process(operator.process.pid)
    before, failed = process.memory_info().rss, operator.metric('alignment_operator_scrapes_total{outcome="failed"}')
    most = [before]

    def all_asked() -> bool:
        most.append(process.memory_info().rss)
        started = time.monotonic()
        assert operator.get("healthz")[0] == 200
        assert time.monotonic() - started < 2.0, "a look at a hostile pod holds everything up"
        return operator.metric('alignment_operator_scrapes_total{outcome="failed"}') >= failed + len(HARM)

    with hostile_pods(DEFAULT_METRICS_PORT) as places:
        driver.apply(manifest("bad", *(sft(f"p{i}") for i in range(len(HARM)))))
        driver.apply(manifest("good", sft()))
        for i, name in enumerate(HARM):
            driver.start(f"bad-p{i}-1", address=places[name][0])
        driver.start("good-sft-1", address=places["honest"][0])
        driver.cluster.wait(lambda: driver.phase("good", "sft").get("progress"), 5, "the neighbour's progress")
        driver.cluster.wait(all_asked, 60, "all hostile pods were asked")
    assert (driver.status("good")["step"], driver.phase("good", "sft")["progress"]["totalSteps"]) == ("7/10", 10)
    assert max(most) - before < MORE_MB * 2**20
    driver.fail("bad-p0-1", "BadInput", NASTY)
    assert driver.until_phase("bad", "p0", "Failed")["message"] == "red line two"
