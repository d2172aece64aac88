"""A job that Kueue has another cluster carry out: its status comes back, its pods are never seen."""

from datetime import UTC, datetime

import pytest
from pods import job as pytorchjob
from pods import pod, said, terminated
from test_trainjob import job as trainjob

from controller.backends.cluster import backend, observe
from controller.plan.observed import JobState, ObservedResult
from trainers.contract import FailureClass

NOW = datetime(2026, 1, 1, 1, tzinfo=UTC)
MULTIKUEUE = "kueue.x-k8s.io/multikueue"


def elsewhere(kind, *conditions):
    """As the API server shows it, after what is remembered of it."""
    if kind == "PyTorchJob":
        found = pytorchjob(*conditions)
        return {**found, "spec": {**found["spec"], "runPolicy": {"managedBy": MULTIKUEUE}}}
    found = trainjob(*(("Complete" if c == "Succeeded" else c, "True") for c in conditions))
    return {**found, "spec": {**found["spec"], "managedBy": MULTIKUEUE}}


@pytest.mark.parametrize("kind", ["PyTorchJob", "TrainJob"])
class TestElsewhere:
    def test_one_that_is_live_is_not_slow_to_start(self, kind):
        seen = observe.observed_job(elsewhere(kind), [], None, NOW)
        assert (seen.state, seen.failure, seen.may_start_since) == (JobState.LIVE, None, None)
        assert "in another cluster" in seen.message

    def test_one_that_has_succeeded_has_a_result_of_its_own(self, kind):
        seen = observe.observed_job(elsewhere(kind, "Succeeded"), [], None, NOW)
        result = backend._result(seen, [], outlived=False)
        assert (seen.state, result) == (JobState.SUCCEEDED, ObservedResult("d", f"elsewhere-{seen.uid}"))
        assert observe.DIGEST.fullmatch(result.artifact_digest)

    def test_one_that_has_failed_says_where(self, kind):
        seen = observe.observed_job(elsewhere(kind, "Failed"), [], None, NOW)
        assert (seen.state, seen.failure) == (JobState.FAILED, FailureClass.INFRASTRUCTURE)
        assert seen.message == "failed in another cluster (MultiKueue), where its pods are: Failed!"


def test_one_of_this_cluster_has_no_result_but_its_pods():
    seen = observe.observed_job(pytorchjob("Succeeded"), [], None, NOW)
    assert backend._result(seen, [], outlived=False) is None
    word = terminated(0, said(None, digest="d", artifactDigest="a"), reason="Completed")
    assert backend._result(seen, [pod(terminated=word)], outlived=False) == ObservedResult("d", "a")
