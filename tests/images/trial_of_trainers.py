"""`make test-images`: the trainers' image from trainers/Dockerfile, and runs in pods of it on a real node.

Not in `make test`: it takes several GB from the network, and more on disk. It prints sizes and times.
"""

import json
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import another_index
import pytest
import yaml
from cluster import buildah, fixtures, product
from cluster.assets import cache_home, locate
from cluster.client import Cluster
from cluster.demo import install_operator
from cluster.installed import Runs
from contents import Image, check, labels
from strict_pods import pod, until_ended, zombies_of_an_orphan

from controller.compose import compose, read_document
from trainers import __version__

IMAGE = product.SHIPPED_TRAINER
BUILD_GB, RUN_GB = 16, 22
"""Layers of all stages, at most; the archive, its copy in a node's store, and the node's unpacked one."""
IMPORTS = """
import accelerate, datasets, matplotlib.pyplot as plot, peft, s3fs, torch, transformers, triton
plot.figure().savefig("/tmp/plot.png")
print(torch.__version__, torch.version.cuda, torch.__file__)
"""


@contextmanager
def timed(what: str) -> Iterator[None]:
    begun = time.monotonic()
    yield
    print(f"[trial] {what}: {time.monotonic() - begun:.0f} s", flush=True)


@pytest.fixture(scope="session")
def node_cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """One node: each keeps the image twice."""
    _demand_disk()
    yield from fixtures.cluster_of("node", request.config, nodes=1)


@pytest.fixture(scope="session")
def installed(node_cluster: Cluster) -> Cluster:
    """The operator as shipped, and the trainers' image under the name that the manifests have for it."""
    install_operator(node_cluster, locate())
    archive = node_cluster.state / "images" / "trainers.tar"
    with (
        timed("building trainers/Dockerfile (what was built before is kept)"),
        product.trainers_store(locate()) as store,
    ):
        with timed("writing the archive"):
            store.export(IMAGE, archive)
        print(f"[trial] all layers: {store.folder}, {_gigabytes(store.folder):.1f} GB; remove it when done")
    print(f"[trial] archive: {archive.stat().st_size / 1e9:.2f} GB")
    with timed("importing it into the node"):
        node_cluster.load_image(archive)
    return node_cluster


@pytest.fixture
def place(installed: Cluster) -> Iterator[Runs]:
    """A restricted namespace with a workspace, and without the packages that other tests bring."""
    namespace = installed.namespace("trial")
    workspace = installed.state / "workspaces" / namespace
    claims = product.claims(namespace, workspace)
    installed.apply([c for c in claims if c["metadata"]["name"].endswith(product.WORKSPACE_CLAIM)])
    yield Runs(installed, namespace, workspace)
    installed.delete_namespace(namespace)


def _demand_disk() -> None:
    folder = cache_home()
    wanted = RUN_GB + (0 if (folder / "containers" / "trainers").exists() else BUILD_GB)
    for place in (folder, Path("/var/tmp")):
        free = shutil.disk_usage(place).free / 1e9
        if free < wanted:
            pytest.exit(f"{free:.0f} GB are free at {place}, and the trial needs {wanted} GB", returncode=2)


def _gigabytes(folder: Path) -> float:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_symlink()) / 1e9


def test_contents(installed: Cluster) -> None:
    image = Image.read(installed.state / "images" / "trainers.tar")
    check(image)
    for folder in ("opt/torch", "opt/venv", "opt/alignment", "usr"):
        print(f"[trial] /{folder}: {image.size(folder) / 1e9:.2f} GB")
    assert image.named("kubernetes", "kopf") == []
    assert image.named("sympy") and "opt/torch/sympy" not in image.files, "packages are there once"
    found = labels(image)
    assert (found["title"], found["version"]) == ("alignment-trainer", __version__)


@pytest.mark.parametrize(("user", "group"), [(1000, 1000), (1000660000, 0)], ids=["1000", "any"])
def test_imports_as_any_user(place: Runs, user: int, group: int) -> None:
    with timed("importing everything in a fresh pod"):
        place.cluster.apply(pod("it", IMAGE, user=user, group=group, args=["python", "-c", IMPORTS]), place.namespace)
        log = until_ended(place.cluster, place.namespace, "it", 300)
    assert "/opt/torch/torch/__init__.py" in log
    print(f"[trial] {log.strip().splitlines()[-1]}")


def test_the_smallest_run(place: Runs) -> None:
    """The sample as it is: the operator's default image."""
    with timed("manifests/samples/minimal.yaml"):
        place.cluster.apply(product.ROOT / "manifests/samples/minimal.yaml", place.namespace)
        place.until_succeeded("minimal")
    assert place.result("minimal", "sft")["steps"] == 40
    assert place.pod("minimal-sft-1")["spec"]["containers"][0]["image"] == IMAGE


def test_the_whole_pipeline(place: Runs) -> None:
    fragment = read_document(product.ROOT / "tests/pipeline/short.yaml")
    run = compose(read_document(product.ROOT / "configs/quickstart.yaml"), [fragment])
    template = {**run["spec"].get("template", {}), "resources": {"requests": {"cpu": "500m"}}}
    run["spec"] |= {"workspace": {"claimName": product.WORKSPACE_CLAIM}, "template": template}
    with timed("the quickstart, shortened: 12 phases"):
        place.cluster.apply(json.dumps(run), place.namespace)
        status = place.until_succeeded("quickstart", 1800)
    assert status["progress"] == "12/12 (100%)"
    assert "quickstart" in (place.folder("quickstart") / "package/report.html").read_text()


@pytest.mark.parametrize(("user", "group"), [(1000, 1000), (1000660000, 0)], ids=["1000", "any"])
def test_the_entry_point_stops_training(place: Runs, user: int, group: int) -> None:
    """By `args` alone: tini takes in an orphan, and passes SIGTERM on."""
    training = yaml.safe_load((product.ROOT / "manifests/samples/minimal.yaml").read_text())["spec"]
    spec = {"model": training["model"], **training["phases"][0]["sft"]}
    spec |= {"duration": {"maxSteps": 100000}, "checkpoint": {"everySeconds": 3600}}
    (place.workspace / "spec.yaml").write_text(json.dumps({"output": "/workspace/out", "spec": spec}))
    document = pod(
        "direct", IMAGE, user=user, group=group, args=["python", "-m", "trainers", "sft", "--spec", "/workspace/spec.yaml"],
        volumeMounts=[{"name": "workspace", "mountPath": "/workspace"}],
        volumes=[{"name": "workspace", "persistentVolumeClaim": {"claimName": product.WORKSPACE_CLAIM}}],
    )  # fmt: skip
    place.cluster.apply(document, place.namespace)
    out = place.workspace / "out"
    place.wait("it trains", (out / "metrics.jsonl").exists, 300)
    assert zombies_of_an_orphan(place.cluster, place.namespace, "direct", "it") == 0
    place.kubectl("delete", "pod", "direct", timeout=90)
    assert len(list(out.glob("checkpoints/step-*"))) == 1


def test_the_cpu_variant_is_from_another_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to the stage that has torch: chosen by arguments, with a password that no layer has."""
    base = locate().image("python")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine 127.0.0.1 login {another_index.USER} password {another_index.PASSWORD}\n")
    with another_index.served(tmp_path / "index", "2.13.0+cpu") as address, buildah.store("cpu", base, []) as store:
        options = {"VARIANT": "cpu", "TORCH_INDEX": address, "NETRC": str(netrc)}
        store.build("trainer", "alignment-trainer:trial", flags="--target=torch", **options)
        name = "alignment-trainer:trial-cpu"
        code = "import sys; sys.path.insert(0, '/opt/torch'); import torch; print(torch.__version__)"
        store.run("from", "--name=it", name)
        assert store.run("run", "it", "--", "python3", "-c", code).strip() == "2.13.0+cpu"
        assert store.run("run", "it", "--", "ls", "/opt/torch").split() == ["torch", "torch-2.13.0+cpu.dist-info"]
        assert another_index.PASSWORD not in store.run("inspect", "--type=image", name)
        found = store.run(
            "run", "it", "--", "sh", "-c", f"grep -rlI {another_index.PASSWORD} /etc /opt /root /run /tmp || true"
        )
        assert found == ""
