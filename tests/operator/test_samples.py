"""Every shipped manifest is taken by the API server, and every sample runs in real pods."""

import json
from pathlib import Path

import pytest
import yaml
from cluster import build
from cluster.client import Cluster
from cluster.images import Layer, write_image
from cluster.installed import Runs
from cluster.kube_http import Server
from driver import ROOT, Driver
from kueue import quota

from controller.preflight import load_run

SAMPLES = sorted((ROOT / "manifests/samples").glob("*.yaml"))
ELSEWHERE = ("object-store", "queued", "suspended")
"""Have tests of their own."""
NOT_HERE = ("sft-only", "distill", "gpus")
"""Need GPUs and models from the hub: only the API server and the models look at them."""
KEYS = {"AWS_ACCESS_KEY_ID": "alignment", "AWS_SECRET_ACCESS_KEY": "a-secret-of-the-test"}
RESTRICTED = {"runAsNonRoot": True, "runAsUser": 1000, "seccompProfile": {"type": "RuntimeDefault"}}
EXAMPLES = [ROOT / "configs/quickstart.yaml", *(ROOT / "configs/examples").glob("*.yaml")]
IMAGE = "local/object-store:1"
RUNS = "/apis/alignment.dev/v1alpha1/namespaces/default/alignmentruns"


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize(
    "path",
    [*SAMPLES, *EXAMPLES],
    ids=lambda p: p.stem,
)
def test_a_real_api_server_takes_it(prepared: Cluster, path: Path):
    taken = Server(prepared).create(f"{RUNS}?dryRun=All&fieldValidation=Strict", read(path))
    assert taken["spec"]["phases"]
    load_run(read(path))


def test_the_kustomization_holds_all_that_is_installed(driver: Driver):
    """`kubectl apply --server-side -k manifests/base`, as the README has it, again and again."""
    for _ in range(2):
        said = driver.cluster.kubectl("apply", "--server-side", "-k", str(ROOT / "manifests/base"))
    assert "deployment.apps/alignment-operator serverside-applied" in said
    assert "customresourcedefinition.apiextensions.k8s.io/alignmentruns.alignment.dev" in said
    driver.cluster.kubectl("delete", "deployment", "alignment-operator", "-n", "alignment-system")


def test_explain_reads_well(driver: Driver):
    text = driver.cluster.kubectl("explain", "alignmentrun.spec.failurePolicy.retries.outOfMemory")
    assert "The device or the machine ran out of memory; see `halveOnOutOfMemory`." in text
    assert "DESCRIPTION" in driver.cluster.kubectl("explain", "arun.spec.phases.dpo.beta")


@pytest.fixture(scope="session")
def store(installed: Cluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The address of an S3 server in a pod."""
    folder = tmp_path_factory.mktemp("object-store")
    (folder / "versitygw").write_bytes(build.ensure("s3").binary("versitygw").read_bytes())
    (folder / "versitygw").chmod(0o755)
    installed.load_image(write_image(IMAGE, [Layer(folder)], folder / "image.tar", user="1000"))
    namespace = installed.namespace("storage")
    installed.apply(_store(), namespace)
    installed.kubectl("wait", "-n", namespace, "pod/store", "--for=condition=Ready", "--timeout=60s", timeout=70)
    return f"http://store.{namespace}.svc.cluster.local:7070"


def _store() -> list[dict]:
    environment = {"ROOT_ACCESS_KEY": KEYS["AWS_ACCESS_KEY_ID"], "ROOT_SECRET_KEY": KEYS["AWS_SECRET_ACCESS_KEY"]}
    return [
        {
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "store", "labels": {"app": "store"}},
            "spec": {
                "securityContext": {**RESTRICTED, "fsGroup": 1000},
                "containers": [{
                    "name": "store", "image": IMAGE,
                    "command": ["/versitygw", "--port", ":7070", "posix", "/data"],
                    "env": [{"name": key, "value": value} for key, value in environment.items()],
                    "readinessProbe": {"tcpSocket": {"port": 7070}, "periodSeconds": 1},
                    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                    "volumeMounts": [{"name": "data", "mountPath": "/data"}],
                }],
                "volumes": [{"name": "data", "emptyDir": {}}],
            },
        },
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "store"},
         "spec": {"selector": {"app": "store"}, "ports": [{"port": 7070}]}},
    ]  # fmt: skip


def _credentials(runs: Runs, store: str, **changes: str) -> None:
    """The Secret that the sample names."""
    literals = {**KEYS, "AWS_ENDPOINT_URL": store, "AWS_REGION": "us-east-1", **changes}
    arguments = [f"--from-literal={key}={value}" for key, value in literals.items()]
    runs.kubectl("create", "secret", "generic", "object-store", *arguments)


@pytest.fixture
def bucket(runs: Runs, store: str) -> str:
    """`alignment`, made from inside the cluster: nothing else reaches the store."""
    _credentials(runs, store)
    code = "import s3fs; s = s3fs.S3FileSystem(); s.exists('alignment') or s.mkdir('alignment')"
    _python_pod(runs, "make-bucket", code)
    return "alignment"


def _python_pod(runs: Runs, name: str, code: str) -> str:
    """Run a few lines with the trainers' packages and the store's credentials. Returns what they print."""
    from cluster import product

    pod = {
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "spec": {
            "restartPolicy": "Never",
            "securityContext": RESTRICTED,
            "containers": [{
                "name": "python", "image": product.TRAINER, "command": ["python", "-c", code],
                "envFrom": [{"secretRef": {"name": "object-store"}}],
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
                "volumeMounts": [{"name": "environment", "mountPath": product.ENVIRONMENT_PATH, "readOnly": True}],
            }],
            "volumes": [{"name": "environment", "persistentVolumeClaim": {"claimName": product.ENVIRONMENT_CLAIM}}],
        },
    }  # fmt: skip
    runs.cluster.apply(pod, runs.namespace)
    phase = runs.wait(f"pod {name} ends", lambda: (p := _phase(runs, name)) in ("Succeeded", "Failed") and p)
    log = runs.kubectl("logs", name)
    assert phase == "Succeeded", log
    return log


def _phase(runs: Runs, name: str) -> str:
    return runs.cluster.get("pod", name, "-n", runs.namespace)["status"].get("phase", "")


@pytest.mark.slow
class TestSamplesRun:
    @pytest.mark.parametrize(
        "path", [p for p in SAMPLES if p.stem not in (*ELSEWHERE, *NOT_HERE)], ids=lambda p: p.stem
    )
    def test_on_a_claim(self, runs: Runs, path: Path):
        self.apply(runs, path)
        runs.until_succeeded(path.stem)
        assert runs.result(path.stem, "sft")["steps"] == 40

    def test_two_seeds_once_they_are_let_go(self, runs: Runs):
        self.apply(runs, ROOT / "manifests/samples/suspended.yaml")
        runs.kubectl("wait", "arun/suspended", "--for=condition=Suspended", "--timeout=30s")
        assert runs.kubectl("get", "pytorchjobs", "-o", "name") == ""
        runs.kubectl("patch", "alignmentrun", "suspended", "--type=merge", "-p", '{"spec": {"suspend": false}}')
        runs.until_succeeded("suspended")
        models = {runs.result("suspended", name)["artifacts"]["model"]["digest"] for name in ("seed-1", "seed-2")}
        assert len(models) == 2

    def test_in_a_queue(self, runs: Runs):
        runs.cluster.apply(quota(runs.namespace, "4"))
        self.apply(runs, ROOT / "manifests/samples/queued.yaml")
        runs.until_succeeded("queued")

    def test_in_an_object_store(self, runs: Runs, bucket: str):
        self.apply(runs, ROOT / "manifests/samples/object-store.yaml")
        runs.until_succeeded("object-store")
        keys = _python_pod(runs, "list", "import s3fs; print(*s3fs.S3FileSystem().find('alignment'), sep='\\n')")
        assert f"runs/{runs.namespace}.object-store/sft/result.json" in keys
        assert f"runs/{runs.namespace}.object-store/dpo/model/model.safetensors" in keys
        assert runs.checkpoints("object-store", "sft") == []  # nothing went to the claim

    def test_in_an_object_store_that_does_not_let_us_in(self, runs: Runs, store: str):
        _credentials(runs, store, AWS_SECRET_ACCESS_KEY="a-wrong-secret")
        self.apply(runs, ROOT / "manifests/samples/object-store.yaml")
        runs.kubectl("wait", "arun/object-store", "--for=condition=Failed", "--timeout=120s", timeout=130)
        phase = runs.phase("object-store", "sft")
        assert phase["failure"] == "BadInput"
        assert "s3://alignment/runs" in phase["message"]
        assert "a-wrong-secret" not in json.dumps(runs.status("object-store"))
        pod = f"{phase['attempts'][0]['job']}-worker-0"
        log = runs.kubectl("logs", pod)
        assert "s3://alignment/runs" in log
        assert "a-wrong-secret" not in log

    @staticmethod
    def apply(runs: Runs, path: Path) -> None:
        document = read(path)
        runs.apply(document["metadata"]["name"], _here(document["spec"]), **document["spec"].get("template", {}))


def _here(spec: dict) -> dict:
    """The sample's spec, less the name of its claim, which is another one here."""
    return {key: value for key, value in spec.items() if key != "workspace" or "claimName" not in value}
