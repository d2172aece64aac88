"""The image of controller/Dockerfile: what is in it, and how it lives in real pods. See also `make test-images`."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from cluster import product
from cluster.client import Cluster
from cluster.installed import Runs
from contents import Image, check, labels
from strict_pods import pod, until_ended, until_running, zombies_of_an_orphan

from trainers import __version__

PACKAGES_MB = 150
WHO = """
import getpass, os, pathlib, tempfile
print(os.getuid(), os.getgid(), getpass.getuser(), pathlib.Path.home())
for folder in ("/", "/opt/alignment", "/opt/venv", "/etc"):
    try:
        pathlib.Path(folder, "new").write_text("")
    except OSError:
        continue
    raise SystemExit(f"{folder} can be written to")
(pathlib.Path.home() / "new").write_text("")
"""


@pytest.fixture(scope="session")
def image(installed: Cluster) -> Image:
    """As the nodes have it."""
    return Image.read(installed.state / "images" / "operator.tar")


@pytest.fixture
def namespace(installed: Cluster) -> Iterator[str]:
    name = installed.namespace("image", restricted=True)
    yield name
    installed.delete_namespace(name)


def test_contents(image: Image) -> None:
    check(image)
    assert image.named("torch", "transformers", "kubernetes") == []
    assert image.size("opt/venv") < PACKAGES_MB * 1e6


def test_nothing_of_the_build_is_told(image: Image) -> None:
    """The secrets' content is nowhere; where they were mounted, nothing is left (checked above)."""
    assert "BEGIN CERTIFICATE" not in image.history
    assert not [v for v in image.config["Env"] if "proxy" in v.lower() or "index" in v.lower()]


def test_labels(image: Image) -> None:
    found = labels(image)
    assert found["title"] == "alignment-operator"
    assert found["version"] == __version__
    assert found["licenses"] == "Apache-2.0"
    assert {"description", "revision", "base.name"} <= set(found)


@pytest.mark.parametrize(("user", "group"), [(1000, 1000), (1000660000, 0)], ids=["1000", "any"])
def test_runs_as_a_user_that_it_does_not_know(installed: Cluster, namespace: str, user: int, group: int) -> None:
    installed.apply(pod("who", product.OPERATOR, user=user, group=group, command=["python", "-c", WHO]), namespace)
    assert until_ended(installed, namespace, "who").split() == [str(user), str(group), "alignment", "/tmp"]


@pytest.mark.parametrize(
    ("name", "how"),
    [("entry-point", {"args": ["--help"]}), ("command", {"command": ["python", "-m", "controller", "--help"]})],
)
def test_starts_the_operator(installed: Cluster, namespace: str, name: str, how: dict[str, list[str]]) -> None:
    """As the image's own user, which the kubelet sees not to be root."""
    installed.apply(pod(name, product.OPERATOR, user=None, **how), namespace)
    assert "Watch AlignmentRuns" in until_ended(installed, namespace, name)


def test_orphans_are_taken_in(installed: Cluster, namespace: str) -> None:
    found = installed.items("pods", "-n", "alignment-system", "-l", "app.kubernetes.io/name=alignment-operator")
    ready = next(p["metadata"]["name"] for p in found if p["status"]["phase"] == "Running")
    assert zombies_of_an_orphan(installed, "alignment-system", ready, "operator") == 0
    # That this can tell: a first process that takes nobody in.
    installed.apply(pod("other", product.OPERATOR, command=["python", "-c", "import time; time.sleep(60)"]), namespace)
    until_running(installed, namespace, "other")
    assert zombies_of_an_orphan(installed, namespace, "other", "it") == 1


class TestTrainersStop:
    """As they are started by the operator's jobs, and by the entry point of trainers/Dockerfile.

    The trainers' own image is too large for here, and the operator's has their source and the same first process.
    """

    def test_by_the_operators_command(self, runs: Runs) -> None:
        training = yaml.safe_load((product.ROOT / "manifests/samples/minimal.yaml").read_text())["spec"]
        training["phases"][0]["sft"] |= {"duration": {"maxSteps": 100000}, "checkpoint": {"everySeconds": 3600}}
        runs.apply("stopped", training)
        runs.wait("it trains", lambda: runs.status("stopped").get("step"))
        assert zombies_of_an_orphan(runs.cluster, runs.namespace, "stopped-sft-1-worker-0", "pytorch") == 0
        assert runs.checkpoints("stopped", "sft") == []
        runs.kubectl("delete", "pod", "stopped-sft-1-worker-0", timeout=90)
        assert len(runs.checkpoints("stopped", "sft")) == 1

    def test_by_the_entry_point(self, runs: Runs) -> None:
        training = yaml.safe_load((product.ROOT / "manifests/samples/minimal.yaml").read_text())["spec"]
        spec = {"model": training["model"], **training["phases"][0]["sft"]}
        spec |= {"duration": {"maxSteps": 100000}, "checkpoint": {"everySeconds": 3600}}
        (runs.workspace / "spec.yaml").write_text(json.dumps({"output": "/workspace/out", "spec": spec}))
        program = ["python", "-m", "trainers", "sft", "--spec", "/workspace/spec.yaml"]
        runs.cluster.apply(
            _with_claims(pod("direct", product.OPERATOR, command=[*entry_point(), *program])), runs.namespace
        )
        out = runs.workspace / "out"
        runs.wait("it trains", (out / "metrics.jsonl").exists)
        assert not list(out.glob("checkpoints/step-*"))
        runs.kubectl("delete", "pod", "direct", timeout=90)
        assert len(list(out.glob("checkpoints/step-*"))) == 1


def entry_point() -> list[str]:
    """That of trainers/Dockerfile."""
    lines = Path(product.ROOT / "trainers/Dockerfile").read_text().splitlines()
    [found] = [line.removeprefix("ENTRYPOINT ") for line in lines if line.startswith("ENTRYPOINT")]
    return json.loads(found)


def _with_claims(document: dict) -> dict:
    mounts = {product.WORKSPACE_CLAIM: "/workspace", product.ENVIRONMENT_CLAIM: product.ENVIRONMENT_PATH}
    spec = document["spec"]
    spec["volumes"] += [{"name": name, "persistentVolumeClaim": {"claimName": name}} for name in mounts]
    [container] = spec["containers"]
    container["volumeMounts"] += [{"name": name, "mountPath": path} for name, path in mounts.items()]
    container["env"] = [{"name": "PYTHONPATH", "value": product.ENVIRONMENT_PATH}]
    return document
