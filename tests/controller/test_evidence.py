"""The true reason of a failure, from what is left on pods."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pods import disruption, pod, said, terminated

from controller.backends.cluster import evidence
from trainers.contract import FAILURES, ROOT_CAUSES, FailureClass

BAD = said("BadInput", "data/a.jsonl:3: no key response")

REASONS = {
    "the phase's own word": (
        pod(phase="Failed", terminated=terminated(2, BAD)),
        ("BadInput", "data/a.jsonl:3: no key response"),
    ),
    "its own word under torchrun, which ends with 1 whatever its workers end with": (
        pod(phase="Failed", terminated=terminated(1, said("OutOfMemory", "CUDA out of memory"))),
        ("OutOfMemory", "CUDA out of memory"),
    ),
    "the kernel's out of memory": (
        pod(phase="Failed", terminated=terminated(137, reason="OOMKilled")),
        ("OutOfMemory", "OOMKilled: the pod needs more memory than its memory limit of 300Mi"),
    ),
    "an eviction that left time to save": (
        pod(phase="Failed", terminated=terminated(143, said("Interrupted", "stopped after step 7 of 9; the checkpoint is saved")),
            conditions=disruption("EvictionByEvictionAPI", "Eviction API: evicting")),
        ("Interrupted", "EvictionByEvictionAPI: evicted (a drain of the node, or another use of the Eviction API) "
                        "(Eviction API: evicting); stopped after step 7 of 9; the checkpoint is saved"),
    ),
    "pressure on the node": (
        pod(phase="Failed", reason="Evicted", message="The node was low on resource: memory."),
        ("Interrupted", "Evicted: The node was low on resource: memory."),
    ),
    "a lost node": (
        pod(conditions=disruption("DeletionByTaintManager"), running={"startedAt": "2026-01-01T00:00:30Z"}),
        ("Infrastructure", "DeletionByTaintManager: its node is lost or tainted NoExecute"),
    ),
    "the scheduler's preemption": (
        pod(conditions=disruption("PreemptionByScheduler")),
        ("Interrupted", "PreemptionByScheduler: preempted by a pod of higher priority"),
    ),
    "a disruption that is not known here": (pod(conditions=disruption("NewKind")), ("Infrastructure", "NewKind: disrupted")),
    "the kubelet's refusal": (
        pod(phase="Failed", reason="UnexpectedAdmissionError", message="no device"),
        ("Infrastructure", "UnexpectedAdmissionError: no device"),
    ),
    "a kill by nobody known": (pod(phase="Failed", terminated=terminated(137)), ("Infrastructure", "ended by SIGKILL")),
    "a stop before it could listen": (
        pod(phase="Failed", terminated=terminated(143)), ("Interrupted", "ended by SIGTERM before it could save"),
    ),
    "a crash in native code": (pod(phase="Failed", terminated=terminated(139)), ("Internal", "crashed with SIGSEGV")),
    "a Python error in another program": (
        pod(phase="Failed", terminated=terminated(1, "Traceback ...\nModuleNotFoundError: No module named 'trainers'\n")),
        ("Internal", "exit status 1: ModuleNotFoundError: No module named 'trainers'"),
    ),
    "an exit status of the contract without a word": (
        pod(phase="Failed", terminated=terminated(75, "")), ("Infrastructure", "exit status 75: nothing was printed"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("sentence", REASONS)
def test_reason(sentence):
    seen, (failure, message) = REASONS[sentence]
    found = evidence.of_pod(seen)
    assert (found.failure, found.message) == (failure, message)
    assert found.node == "node-1"


@pytest.mark.parametrize(
    "seen",
    [pod(), pod(phase="Succeeded", terminated=terminated(0, said(None, artifactDigest="a"))), pod(phase="Pending"),
     pod(running={"startedAt": "2026-01-01T00:00:30Z"})],
)  # fmt: skip
def test_no_reason(seen):
    assert evidence.of_pod(seen) is None


def test_the_cause_and_not_what_followed_from_it():
    """A worker meets a bad row; its peers lose the connection first in time."""
    network = said("Infrastructure", "Connection closed by peer")
    pods = [
        pod(0, "Failed", "node-1", terminated=terminated(75, network, at="2026-01-01T00:09:00Z")),
        pod(1, "Failed", "node-2", terminated=terminated(2, BAD)),
        pod(2, "Failed", "node-3", terminated=terminated(75, network)),
    ]
    assert evidence.find(pods).node == "node-2"
    assert evidence.find(pods).failure == FailureClass.BAD_INPUT


NETWORK = said("Infrastructure", "Connection closed by peer")
KILLED = said("Infrastructure", "rank 1: killed by SIGKILL", seen=True)
ODD = said("Internal", "RuntimeError: peer went away in words that nobody knows")
EARLY = "2026-01-01T00:09:00Z"


def failed(index, code, message="", **more):
    return pod(index, "Failed", f"node-{index + 1}", terminated=terminated(code, message, **more))


LOST = pod(1, node="node-2", conditions=disruption("DeletionByTaintManager"), running={"startedAt": EARLY})
DRAINED = pod(1, "Failed", "node-2", terminated=terminated(75, NETWORK), conditions=disruption("EvictionByEvictionAPI"))

CAUSES = {
    "a lost node, and a peer asked to stop": ([failed(0, 143, said("Interrupted", "stopped"), at=EARLY), LOST], "node-2"),
    "a lost node, and a peer whose launcher gave up": ([failed(0, 1, "RendezvousClosedError", at=EARLY), LOST], "node-2"),
    "a lost node, and a peer's unknown words": ([failed(0, 1, ODD, at=EARLY), LOST], "node-2"),
    "a drained node, and a peer's network": ([failed(0, 75, NETWORK, at=EARLY), DRAINED], "node-2"),
    "a killed rank, and a peer's unknown words": ([failed(0, 1, ODD, at=EARLY), failed(1, 75, KILLED)], "node-2"),
    "a killed rank, and a peer's network": ([failed(0, 75, NETWORK, at=EARLY), failed(1, 75, KILLED)], "node-2"),
    "a killed pod, and a peer without a word": ([failed(0, 1, at=EARLY), failed(1, 137)], "node-2"),
    "a killed pod, and a peer's unknown words": ([failed(0, 1, ODD, at=EARLY), failed(1, 137)], "node-2"),
    "a network that broke, and a peer without a word": ([failed(0, 1, at=EARLY), failed(1, 75, NETWORK)], "node-2"),
    "a disk that failed, and a peer asked to stop": (
        [failed(0, 143, said("Interrupted", "stopped"), at=EARLY), failed(1, 75, said("Infrastructure", "EIO"))], "node-2",
    ),
    "a mistake, and a pod that was killed": ([failed(0, 2, BAD), failed(1, 137, at=EARLY)], "node-1"),
    "a bug, and a peer asked to stop": ([failed(0, 1, ODD), failed(1, 143, at=EARLY)], "node-1"),
}  # fmt: skip


@pytest.mark.parametrize("sentence", CAUSES)
def test_what_follows_from_a_cause_does_not_hide_it(sentence):
    pods, node = CAUSES[sentence]
    assert evidence.find(pods).node == node
    assert evidence.find(reversed(pods)).node == node


def test_a_silent_node_is_blamed_on_the_word_of_those_that_have_lost_it():
    word = said("Infrastructure", "node rank 1 has not answered for 15 s", seen=True, lostNode=1)
    ended = pod(0, phase="Failed", node="here", terminated=terminated(75, word))
    silent = pod(1, node="there", running={"startedAt": "2026-01-01T00:00:30Z"})
    for pods in ([ended, silent], [silent, ended]):
        found = evidence.find(pods)
        assert (found.message, found.node) == ("node rank 1 has not answered for 15 s", "there")
    assert evidence.find([ended]).node == "", "not the node that told"


def test_a_pod_that_is_killed_when_its_grace_is_over_is_no_cause():
    deleted = failed(1, 137, at=EARLY)
    deleted["metadata"]["deletionTimestamp"] = EARLY
    assert evidence.find([deleted, failed(0, 1, ODD)]).node == "node-1"


def test_every_class_that_a_process_can_end_with_has_its_place_among_causes():
    assert set(ROOT_CAUSES) == {f for f, known in FAILURES.items() if known.code is not None}


def test_a_pod_may_say_what_only_an_onlooker_can_tell():
    """Its image is the user's, and its word must not stop the operator."""
    claims = pod(0, "Failed", terminated=terminated(1, said("Stalled", "so it says")))
    assert evidence.find([claims]).failure == FailureClass.STALLED
    assert evidence.find([claims, pod(1, "Failed", terminated=terminated(2, BAD))]).failure == FailureClass.BAD_INPUT


HOLDUPS = {
    "no room": (
        pod(phase="Pending", conditions=[{"type": "PodScheduled", "status": "False", "reason": "Unschedulable",
                                          "message": "0/2 nodes: Insufficient nvidia.com/gpu"}]),
        "Unschedulable: 0/2 nodes: Insufficient nvidia.com/gpu",
    ),
    "no image": (
        pod(phase="Pending", waiting={"reason": "ImagePullBackOff", "message": 'Back-off pulling image "a/b:1"'}),
        'ImagePullBackOff a/b:1: Back-off pulling image "a/b:1"',
    ),
    "no secret": (
        pod(phase="Pending", waiting={"reason": "CreateContainerConfigError", "message": 'secret "hub" not found'}),
        'CreateContainerConfigError: secret "hub" not found',
    ),
    "no image of a container before": (
        pod(phase="Pending", waiting={"reason": "PodInitializing"},
            initContainerStatuses=[{"name": "server", "image": "vllm:1", "state": {
                "waiting": {"reason": "ImagePullBackOff", "message": "no such tag"}}}]),
        "server: ImagePullBackOff vllm:1: no such tag",
    ),
    "on its way": (pod(phase="Pending", waiting={"reason": "ContainerCreating"}), ""),
}  # fmt: skip


@pytest.mark.parametrize("sentence", HOLDUPS)
def test_what_keeps_a_pod_from_running(sentence):
    seen, message = HOLDUPS[sentence]
    assert evidence.holdup([pod(), seen]) == message


def test_an_image_name_that_cannot_be_is_the_users_mistake():
    seen = pod(phase="Pending", waiting={"reason": "InvalidImageName", "message": "invalid reference format"})
    assert evidence.hopeless([pod(), seen]).failure == FailureClass.BAD_INPUT
    assert evidence.hopeless([pod(phase="Pending", waiting={"reason": "ErrImagePull"})]) is None


class TestHasEnded:
    def deleted(self, at, **state):
        seen = pod(**state)
        seen["metadata"]["deletionTimestamp"] = at
        return seen

    def test_a_pod_that_is_saving_has_not(self):
        now = datetime(2026, 1, 1, 0, 10, 10, tzinfo=UTC)
        assert not evidence.has_ended(pod(), now, 30)
        assert not evidence.has_ended(self.deleted("2026-01-01T00:10:00Z"), now, 30)

    def test_one_whose_time_is_long_over_has(self):
        now = datetime(2026, 1, 1, 0, 11, 0, tzinfo=UTC)
        assert evidence.has_ended(self.deleted("2026-01-01T00:10:00Z"), now, 30)

    def test_one_on_a_lost_node_has(self):
        now = datetime(2026, 1, 1, 0, 10, 0, tzinfo=UTC)
        lost = self.deleted("2026-01-01T00:12:00Z", conditions=disruption("DeletionByTaintManager"))
        assert evidence.has_ended(lost, now, 30)

    @pytest.mark.parametrize("phase", ["Failed", "Succeeded"])
    def test_one_that_says_so_has(self, phase):
        assert evidence.has_ended(pod(phase=phase), datetime(2026, 1, 1, tzinfo=UTC), 30)


@given(st.text(), st.integers(0, 255), st.sampled_from(["Error", "OOMKilled", "Completed", ""]))
def test_whatever_a_pod_leaves_has_an_answer(message, code, reason):
    found = evidence.of_pod(pod(phase="Failed", terminated=terminated(code, message, reason)))
    assert (found is None) == (code == 0 and reason != "OOMKilled")
