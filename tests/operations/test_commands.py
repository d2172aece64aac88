"""Every command of docs/operations.md and of the runbooks, typed in the order of the page on a cluster of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from chart import helm
from cluster import product
from cluster.client import Cluster
from cluster.installed import ONE_THREAD
from monitoring import prometheus_operator

from operations.page import ROOT, RUNBOOKS, blocks, files, inline, runbook_commands, sections

NOT_RUN = {
    "kubectl logs -n alignment-system -l app.kubernetes.io/name=alignment-operator --previous --tail=50":
        "no replica has been restarted",
    "kubectl align stop": "words of an explanation: the run has ended, and tests/controller stops one",
    "kubectl align stop --run RUN -n NAMESPACE": "the same",
    "kubectl align rerun RUN -n NAMESPACE": "it would compute what the test shows is computed once; tests/operator reruns",
    "alignctl runs --workspace DIR": "words of an explanation; tests/controller/test_holdings.py does it",
    "alignctl history --workspace DIR": "the same",
    "kubectl apply --server-side -k": "the README's command, with its folder; tests/cluster installs so",
    "make images": "words of an explanation; tests/images builds one so, `make test-images` the other",
    "make images REGISTRY=ADDRESS": "the same",
    'make bench-operator RUNS=200 ENDED=10000 TRAINING=1000 RATES="2 5"': "tests/operator/test_scale.py, with fewer runs",
    "make bench-operator QUEUED=3000 TRAINING=1000 RATES=2": "tests/operator/test_scale.py, with fewer runs",
    "make bench-operator ENDED=9000 RUNS=1000 PHASES=8": "tests/operator/test_scale.py, with fewer runs",
    "kubectl delete pod": "part of a sentence",
    "kubectl describe": "part of a sentence",
    "kubectl get": "part of a sentence",
    "helm test --logs": "part of a sentence, about a test that fails; tests/chart has one",
    "helm test": "part of a sentence; in full in a block",
    "helm upgrade": "part of a sentence; in full in a block",
    "helm rollback": "part of a sentence; in full in a block",
}  # fmt: skip
WORDS = {"NAMESPACE": "team-a", "RUN": "minimal", "PHASE": "sft", "POD": "minimal-sft-1-worker-0"}


@pytest.fixture
def cluster(fresh_cluster: Cluster) -> Cluster:
    """With the kinds of the Prometheus Operator."""
    fresh_cluster.define(prometheus_operator.kinds())
    return fresh_cluster


@pytest.fixture
def desk(cluster: Cluster, tmp_path: Path) -> Path:
    """The folder in which somebody types: the repository's, with files of their own."""
    for name in ("helm", "manifests", "docs", "Makefile"):
        (tmp_path / name).symlink_to(ROOT / name)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "helm").symlink_to(helm.binary())
    (programs / "kubectl").symlink_to(cluster.kubectl_binary)
    (tmp_path / "kubeconfig").write_text(cluster.kubeconfig.read_text())
    template = {**product.TEMPLATE, "env": ONE_THREAD}
    run = yaml.safe_load((ROOT / "manifests/samples/minimal.yaml").read_text())
    run["spec"]["template"] = template
    _write(tmp_path / "run.yaml", run)
    _write(tmp_path / "claim.yaml", *product.claims("team-a", tmp_path / "workspace"))
    # The images of this tree, whose packages come by a claim.
    claim = {"claimName": product.WORKSPACE_CLAIM}
    values = {
        "image": {"tag": "test"},
        "defaults": {"trainerImage": {"tag": "test"}, "workspaceClaim": product.WORKSPACE_CLAIM},
        "test": {"namespace": "team-a", "run": {"workspace": claim, "template": template}},
    }
    _write(tmp_path / "values.yaml", values)
    for name in ("monitoring.yaml", "limits.yaml"):
        (tmp_path / name).write_text(files()[name])
    return tmp_path


def _write(path: Path, *documents: object) -> None:
    path.write_text(yaml.safe_dump_all(documents))


def typed(desk: Path, command: str) -> str:
    programs = f"{desk / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": programs, "KUBECONFIG": str(desk / "kubeconfig")}
    shell = ["bash", "-euo", "pipefail", "-c", command]
    done = subprocess.run(shell, cwd=desk, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


def about_the_run(command: str) -> str:
    for word, name in WORDS.items():
        command = command.replace(word, name)
    return command


@pytest.mark.node
@pytest.mark.slow
def test_every_command_does_what_the_page_says(desk: Path):
    """Those with placeholders, and the runbooks', where the page has come to its own about trouble."""
    loose = [c for text in sections().values() for c in inline(text)] + runbook_commands()
    result = desk / "workspace/team-a.minimal/sft/result.json"
    finished, count = b"", 0
    for heading, text in sections().items():
        for block in blocks("bash", text):
            typed(desk, block)
            count += len(block.splitlines())
        if heading == "Install":
            finished = result.read_bytes()
        if heading == "The operator itself":
            for command in dict.fromkeys(loose):
                if command not in NOT_RUN:
                    typed(desk, about_the_run(command))
                    count += 1
    assert count > 70
    assert json.loads(finished)["steps"] == 40
    assert result.read_bytes() == finished, "what was finished was computed again"


def test_nothing_typed_is_left_out_but_what_is_named():
    prose = {code for path in RUNBOOKS for code in inline(path.read_text())}
    told = {c for text in sections().values() for c in inline(text)} | set(runbook_commands())
    assert prose <= set(NOT_RUN) | told
    assert set(NOT_RUN) <= prose | told, "an exception that nobody needs"
