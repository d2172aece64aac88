"""What users say of their pods: what is rendered, what is refused, and what none of it changes."""

import json
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import pytest
from builders import START, artifact, digests, document, make_run, results, seen, sft, with_status
from builders import job as attempt
from pods import job, pod, said, terminated
from pydantic import ValidationError

from controller.api.run import AlignmentRun
from controller.api.workspace import Workspace
from controller.backends.cluster import evidence, observe
from controller.backends.cluster.kind import Owner
from controller.backends.cluster.pytorchjob import render
from controller.backends.cluster.settings import Settings
from controller.operator.defaults import Defaults
from controller.plan.check import check_run
from controller.plan.decide import Apply, decide
from controller.plan.observed import JobState, ObservedResult
from trainers.contract import FailureClass

NOW = datetime(2026, 1, 1, 0, 10, tzinfo=UTC)
WORK = Defaults(workspace=Workspace(claim_name="work"))

EVERYTHING = {
    "labels": {"team": "alignment", "example.com/cost": "a1"},
    "annotations": {
        "k8s.v1.cni.cncf.io/networks": "rdma-0, rdma-1",
        "kueue.x-k8s.io/podset-required-topology": "cloud.provider.com/rack",
        "sidecar.istio.io/inject": "true",
    },
    "affinity": {
        "nodes": [
            {"key": "nvidia.com/gpu.product", "values": ["H100", "H200"]},
            {"key": "spot", "operator": "DoesNotExist"},
            {"key": "rack", "operator": "Exists", "weight": 10},
        ],
        "pods": [
            {"topologyKey": "kubernetes.io/hostname", "apart": True},
            {"topologyKey": "rack", "weight": 100},
            {"topologyKey": "rack", "apart": True, "matchLabels": {"app": "noisy"}, "weight": 5},
        ],
    },
    "topologySpreadConstraints": [{"topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"}],
    "runtimeClassName": "nvidia",
    "schedulerName": "volcano",
    "imagePullPolicy": "Always",
    "imagePullSecrets": ["registry"],
    "resourceClaims": [
        {"name": "gpu", "resourceClaimTemplateName": "one-gpu", "request": "gpu"},
        {"name": "nic", "resourceClaimName": "shared"},
    ],
    "securityContext": {"runAsUser": 4711, "runAsGroup": 0, "fsGroup": 4712, "supplementalGroups": [100]},
    "volumes": [
        {"mountPath": "/tmp", "ephemeral": {"size": "500Gi", "storageClassName": "nvme"}},
        {"mountPath": "/cache", "csi": {"driver": "cache.example.com", "volumeAttributes": {"size": "1Ti"}}},
        {"mountPath": "/models", "image": {"reference": "registry/model:1", "pullPolicy": "IfNotPresent"}},
        {"mountPath": "/scratch", "emptyDir": {"sizeLimit": "10Gi"}},
    ],
}


def job_of(run, observed=None, now=START):
    [action] = [a for a in decide(WORK.applied(run), observed or seen(), now).actions if isinstance(a, Apply)]
    return render(action.job, Owner("default", "test", "uid-1", "default.test"), Settings("trainer:1"))


def pods_of(document):
    template = document["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]
    return template["metadata"], template["spec"]


class TestRendered:
    def test_labels_and_annotations_are_beside_the_operators_own(self):
        metadata, _ = pods_of(job_of(make_run(sft("base"), template=EVERYTHING)))
        assert metadata["labels"]["team"] == "alignment"
        assert metadata["labels"]["alignment.dev/run"] == "test"
        assert metadata["annotations"]["sidecar.istio.io/inject"] == "true", "it can be asked for"
        assert "alignment.dev/phase-file" in metadata["annotations"]

    def test_nodes_are_required_together_and_preferred_one_by_one(self):
        _, spec = pods_of(job_of(make_run(sft("base"), template=EVERYTHING)))
        nodes = spec["affinity"]["nodeAffinity"]
        [term] = nodes["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
        assert term["matchExpressions"] == [
            {"key": "nvidia.com/gpu.product", "operator": "In", "values": ["H100", "H200"]},
            {"key": "spot", "operator": "DoesNotExist"},
        ]
        rack = {"key": "rack", "operator": "Exists"}
        preferred = nodes["preferredDuringSchedulingIgnoredDuringExecution"]
        assert preferred == [{"weight": 10, "preference": {"matchExpressions": [rack]}}]

    def test_nodes_that_failed_are_avoided_beside_what_is_wished(self):
        run = make_run(sft("base"), template=EVERYTHING, failurePolicy={"avoidFailedNodes": True})
        lost = FailureClass.INFRASTRUCTURE
        failed = attempt(run, "base", 1, JobState.FAILED, failure=lost, finished_at=START, node="bad")
        _, spec = pods_of(job_of(run, seen(failed), START + timedelta(seconds=100)))
        rack, away = spec["affinity"]["nodeAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
        assert rack["weight"] == 10
        assert away["preference"]["matchFields"] == [{"key": "metadata.name", "operator": "NotIn", "values": ["bad"]}]

    def test_services_of_the_namespace_set_no_variables(self):
        """One called vllm set VLLM_PORT, by which vLLM did not start."""
        _, spec = pods_of(job_of(make_run(sft("base"))))
        assert spec["enableServiceLinks"] is False

    def test_pods_without_labels_are_those_of_the_same_job(self):
        _, spec = pods_of(job_of(make_run(sft("base"), template=EVERYTHING)))
        own = {"alignment.dev/run": "test", "alignment.dev/phase": "base", "alignment.dev/attempt": "1"}
        apart = spec["affinity"]["podAntiAffinity"]
        assert apart["requiredDuringSchedulingIgnoredDuringExecution"] == [
            {"topologyKey": "kubernetes.io/hostname", "labelSelector": {"matchLabels": own}}
        ]
        [other] = apart["preferredDuringSchedulingIgnoredDuringExecution"]
        assert other["podAffinityTerm"]["labelSelector"] == {"matchLabels": {"app": "noisy"}}
        [together] = spec["affinity"]["podAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
        assert together["podAffinityTerm"]["labelSelector"] == {"matchLabels": own}
        [spread] = spec["topologySpreadConstraints"]
        assert spread["labelSelector"] == {"matchLabels": own}

    def test_a_volume_stands_in_for_the_pods_own_at_its_place(self):
        _, spec = pods_of(job_of(make_run(sft("base"), template=EVERYTHING)))
        [container] = spec["containers"]
        mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert len(mounted) == len(container["volumeMounts"])
        volumes = {volume.pop("name"): volume for volume in spec["volumes"]}
        assert set(mounted.values()) == set(volumes)
        claim = volumes[mounted["/tmp"]]["ephemeral"]["volumeClaimTemplate"]["spec"]
        assert (claim["storageClassName"], claim["resources"]) == ("nvme", {"requests": {"storage": "500Gi"}})
        assert volumes[mounted["/models"]]["image"]["reference"] == "registry/model:1"

    def test_devices_are_claimed_by_the_pod_and_used_by_its_container(self):
        _, spec = pods_of(job_of(make_run(sft("base"), template=EVERYTHING)))
        assert spec["resourceClaims"] == [
            {"name": "gpu", "resourceClaimTemplateName": "one-gpu"},
            {"name": "nic", "resourceClaimName": "shared"},
        ]
        assert spec["containers"][0]["resources"]["claims"] == [{"name": "gpu", "request": "gpu"}, {"name": "nic"}]

    def test_whatever_users_say_it_stays_within_the_restricted_level(self):
        _, spec = pods_of(job_of(make_run(sft("base"), template=EVERYTHING)))
        context = spec["securityContext"]
        assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (4711, 0, 4712)
        assert context["runAsNonRoot"] is True
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not any("hostPath" in volume for volume in spec["volumes"])


class TestServers:
    """A phase that starts a vLLM has it in a container beside the trainers'."""

    SERVER = {"image": "vllm:1", "resources": {"limits": {"nvidia.com/gpu": 2}}}

    def pod(self, url=None, **template):
        policy = {"source": "/workspace/model", **({"url": url} if url else {})}
        rollout = {"policy": policy, "data": {"prompts": [{"files": "p.jsonl"}]}, "sampling": {"engine": "vllm"}}
        run = make_run({"name": "traces", "rollout": rollout}, template={"server": self.SERVER, **template})
        return pods_of(job_of(run))[1]

    def test_it_is_there_before_them_and_ends_with_them(self):
        [server] = self.pod()["initContainers"]
        assert server["restartPolicy"] == "Always", "Kubernetes' mark of a sidecar, which no pod waits for"
        assert server["image"] == "vllm:1"
        assert server["resources"]["limits"] == {"nvidia.com/gpu": "2"}

    def test_it_sees_what_they_see_and_is_as_restricted(self):
        spec = self.pod(volumes=[{"mountPath": "/cache", "emptyDir": {}}], env=[{"name": "A", "value": "1"}])
        [server], [trainer] = spec["initContainers"], spec["containers"]
        assert server["volumeMounts"] == trainer["volumeMounts"]
        assert server["securityContext"] == trainer["securityContext"]
        assert {"name": "A", "value": "1"} in server["env"]
        assert {"name": "ALIGNMENT_SERVER_KEEPER", "value": "/tmp/keeper"} in trainer["env"]

    def test_its_program_keeps_servers(self, tmp_path):
        """As the container runs it, with a socket elsewhere."""
        [server] = self.pod()["initContainers"]
        *program, place = server["command"]
        assert place == "/tmp/keeper"
        door = tmp_path / "door"
        process = subprocess.Popen([sys.executable, *program[1:], str(door)])
        with socket.socket(socket.AF_UNIX) as line:
            while line.connect_ex(str(door)):
                time.sleep(0.05)
            order = {"command": ["sh", "-c", "exit 7"], "environment": {}, "log": str(tmp_path / "log"), "scratch": []}
            line.sendall(json.dumps(order).encode() + b"\n")
            assert json.loads(line.recv(100)) == {"status": 7}
        process.terminate()
        assert process.wait(60) == 0

    def test_phases_that_start_none_have_none(self):
        assert "initContainers" not in self.pod(url="http://vllm:8000")
        _, spec = pods_of(job_of(make_run(sft("base"), template={"server": self.SERVER})))
        assert "initContainers" not in spec
        assert not [e for e in spec["containers"][0]["env"] if e["name"] == "ALIGNMENT_SERVER_KEEPER"]


def test_user_and_groups_can_be_left_to_the_cluster():
    """OpenShift gives every namespace a range of its own, and refuses pods that name others."""
    run = WORK.applied(make_run(sft("base")))
    [action] = decide(run, seen(), START).actions
    _, spec = pods_of(render(action.job, Owner("default", "test", "uid-1", "default.test"), Settings(user=None)))
    assert spec["securityContext"].keys() & {"runAsUser", "runAsGroup", "fsGroup"} == set()
    assert spec["securityContext"]["runAsNonRoot"] is True


@pytest.mark.parametrize("field", EVERYTHING)
def test_none_of_it_is_part_of_a_phases_identity(field):
    plain, with_field = make_run(sft("base")), make_run(sft("base"), template={field: EVERYTHING[field]})
    assert digests(plain) == digests(with_field)
    done = with_status(plain, decide(plain, seen(results=results(plain, "base")), START))
    edited = with_field.model_copy(update={"status": done.status})
    decision = decide(edited, seen(), START)
    assert decision.actions == ()
    assert decision.status.phases[0].artifact_digest == artifact("base")


def test_an_upgrade_does_not_forgive_failures():
    """The mark of a phase's settings is kept in the status: fields that nobody has set are not in it."""
    assert make_run(sft("base")).spec.template.document().keys() & EVERYTHING.keys() == set()


REFUSED = {
    "own label": ({"labels": {"alignment.dev/run": "x"}}, '"alignment.dev/run" is the operator\'s own'),
    "label of the chart": ({"labels": {"app.kubernetes.io/managed-by": "x"}}, "is the operator's own"),
    "queue": ({"labels": {"kueue.x-k8s.io/queue-name": "x"}}, "is the operator's own"),
    "own annotation": ({"annotations": {"alignment.dev/phase-file": "{}"}}, "is the operator's own"),
    "no key": ({"labels": {"a b": "x"}}, '"a b" is no key'),
    "no label": ({"labels": {"a": "x y"}}, "should match pattern"),
    "values missing": ({"affinity": {"nodes": [{"key": "a"}]}}, "a: In needs values"),
    "values given": ({"affinity": {"nodes": [{"key": "a", "operator": "Exists", "values": ["b"]}]}}, "has no values"),
    "no number": ({"affinity": {"nodes": [{"key": "a", "operator": "Gt", "values": ["b"]}]}}, "a whole number"),
    "two numbers": ({"affinity": {"nodes": [{"key": "a", "operator": "Lt", "values": ["1", "2"]}]}}, 'not "1, 2"'),
    "no number of 64 bits": (
        {"affinity": {"nodes": [{"key": "a", "operator": "Gt", "values": ["9223372036854775808"]}]}},
        'a: Gt needs one value, a whole number up to 9223372036854775807, not "9223372036854775808"',
    ),
    "root": ({"securityContext": {"runAsUser": 0}}, "greater than or equal to 1"),
    "two kinds": (
        {"volumes": [{"mountPath": "/a", "emptyDir": {}, "image": {"reference": "a"}}]},
        "set exactly one of",
    ),
    "host": ({"volumes": [{"mountPath": "/a", "hostPath": {"path": "/"}}]}, "Extra inputs"),
    "domains": (
        {"topologySpreadConstraints": [{"topologyKey": "a", "minDomains": 2, "whenUnsatisfiable": "ScheduleAnyway"}]},
        "minDomains 2 needs",
    ),
}


@pytest.mark.parametrize(("template", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused(template, message):
    with pytest.raises(ValidationError, match=message):
        AlignmentRun.model_validate(document(sft("base"), template=template))


def test_a_node_may_be_compared_with_any_number_of_64_bits():
    run = make_run(
        sft("base"), template={"affinity": {"nodes": [{"key": "a", "operator": "Lt", "values": [str(2**63 - 1)]}]}}
    )
    assert run.spec.template.affinity.nodes[0].values == ("9223372036854775807",)


CLAIM = {"claimName": "a", "mountPath": "/a"}
MOUNTS = {
    "twice": ({"claims": [CLAIM], "volumes": [{"mountPath": "/a/", "emptyDir": {}}]}, '"/a" is the mountPath of 2'),
    "the phase's": ({"volumes": [{"mountPath": "/etc/alignment/", "emptyDir": {}}]}, "is the pod's own"),
    "the phase's, by another way": ({"volumes": [{"mountPath": "/a/../etc", "emptyDir": {}}]}, 'it has ".."'),
    "the phase's, with slashes": ({"volumes": [{"mountPath": "//etc//alignment/.", "emptyDir": {}}]}, "is the pod's own"),
    "clears screens": ({"volumes": [{"mountPath": "/a\x1b[2J", "emptyDir": {}}]}, "cannot be shown"),
    "the workspace's": ({"volumes": [{"mountPath": "/workspace", "emptyDir": {}}]}, "the claim of spec.workspace"),
}  # fmt: skip


@pytest.mark.parametrize(("template", "message"), MOUNTS.values(), ids=MOUNTS)
def test_mounts_that_hide_each_other_are_refused(template, message):
    [problem] = check_run(WORK.applied(make_run(sft("base"), template=template)))
    assert message in str(problem)


def test_mounts_of_run_and_phase_are_looked_at_together():
    phase = {**sft("base"), "template": {"volumes": [{"mountPath": "/a", "emptyDir": {}}]}}
    [problem] = check_run(make_run(phase, template={"claims": [{"claimName": "a", "mountPath": "/a"}]}))
    assert str(problem).startswith("spec.phases[base].template.volumes: ")


# ---------------------------------------------------------------- sidecars


def beside_a_sidecar(code=0, message="", at="2026-01-01T00:05:00Z", index=0):
    """The trainer has ended; an injector's container, put before it, has not."""
    found = pod(index, "Running", terminated=terminated(code, message, at=at))
    found["spec"]["containers"].insert(0, {"name": "proxy", "image": "proxy:1"})
    found["status"]["containerStatuses"].insert(0, {"name": "proxy", "state": {"running": {"startedAt": at}}})
    return found


class TestSidecars:
    SAID = said(None, digest="d", artifactDigest="a")

    def test_a_job_is_outlived_when_all_of_it_has_trained(self):
        pods = [beside_a_sidecar(), beside_a_sidecar(index=1)]
        assert observe.outlived(job(replicas=2), pods, NOW)
        assert not observe.outlived(job(replicas=2), pods[:1], NOW), "one is missing"
        assert not observe.outlived(job(replicas=2), [pods[0], pod(1, running={})], NOW), "one trains"
        assert not observe.outlived(job("Succeeded", replicas=2), pods, NOW), "it has ended"
        assert not observe.outlived(job(replicas=2), [pods[0], beside_a_sidecar(1, index=1)], NOW), "one has failed"

    def test_sidecars_have_time_to_leave_with_the_trainer(self):
        soon = NOW - timedelta(minutes=5) + timedelta(seconds=10)
        assert not observe.outlived(job(), [beside_a_sidecar()], soon)

    def test_its_result_counts_and_the_rest_is_ended(self):
        run = make_run(sft("base"))
        live = attempt(run, "base")
        before = with_status(run, decide(run, seen(live), START))
        found = {"base": ObservedResult(digests(run)["base"], artifact("base"))}
        decision = decide(before, seen(live, results=found), START)
        assert [str(action) for action in decision.actions] == ["Delete(phase='base', attempt=1)"]
        assert decision.status.phases[0].state == "Succeeded"
        again = decide(with_status(run, decision), seen(live), START)
        assert len(again.actions) == 1, "a deletion that got lost is asked for again"
        assert not again.status.is_true("Succeeded")
        assert decide(with_status(run, decision), seen(), START).status.is_true("Succeeded")

    def test_a_word_that_was_lost_is_a_failure_that_is_tried_again(self):
        observed = observe.observed_job(job(), [beside_a_sidecar()], None, NOW)
        assert (observed.state, observed.failure) == (JobState.LIVE, FailureClass.INFRASTRUCTURE)
        said_it = observe.observed_job(job(), [beside_a_sidecar(message=self.SAID)], None, NOW)
        assert said_it.failure is None

    def test_a_trainer_that_failed_beside_one_says_why(self):
        why = json.dumps({"failure": "BadInput", "message": "no such file"})
        observed = observe.observed_job(job(), [beside_a_sidecar(2, why)], None, NOW)
        assert (observed.failure, observed.message) == (FailureClass.BAD_INPUT, "no such file")

    def test_a_pod_whose_trainer_has_ended_writes_nothing_more(self):
        assert evidence.has_ended(beside_a_sidecar(), NOW, 30)

    def test_limits_and_images_are_the_trainers(self):
        killed = beside_a_sidecar()
        killed["status"]["containerStatuses"][1]["state"]["terminated"] |= {"reason": "OOMKilled", "exitCode": 137}
        assert "300Mi" in evidence.of_pod(killed).message
