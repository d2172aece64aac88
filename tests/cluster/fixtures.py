"""pytest plugin: `api_cluster`, `kwok_cluster`, `node_cluster`, each started once a session when a test asks for it.

Where a tier cannot run its tests are skipped, and the summary says so; with CI=true they fail. With
ALIGNMENT_TEST_CONTEXT=<kube context> the tests use that cluster, and no other.
"""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import build, images, launch, requirements
from cluster.assets import Assets, locate
from cluster.client import Cluster

CONTEXT = "ALIGNMENT_TEST_CONTEXT"
NODES = {"api": 0, "kwok": 10, "node": 2}
_not_run: dict[str, str] = {}
_started: dict[str, Cluster] = {}


@pytest.fixture(scope="session")
def api_cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """A control plane with Training Operator and Kueue; no scheduler, so pods stay Pending."""
    yield from cluster_of("api", request.config)


@pytest.fixture(scope="session")
def kwok_cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """The same with a scheduler and ten fake nodes; see cluster.stages for what their pods do."""
    yield from cluster_of("kwok", request.config)


@pytest.fixture(scope="session")
def node_cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """Two real nodes that run containers. Needs root."""
    yield from cluster_of("node", request.config)


def pytest_configure(config: pytest.Config) -> None:
    for tier in NODES:
        config.addinivalue_line("markers", f"{tier}: uses the {tier} tier of the test cluster (set by its fixture)")


@pytest.hookimpl(tryfirst=True)  # before `-m` selects
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for tier in NODES:
            if f"{tier}_cluster" in getattr(item, "fixturenames", ()):
                item.add_marker(tier)
                item.add_marker("slow")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    used = [c for tier, c in _started.items() if f"{tier}_cluster" in getattr(item, "fixturenames", ())]
    if report.failed and report.when == "call":
        for cluster in used:
            logs = launch.keep_logs(cluster.state)
            report.sections.append((f"{cluster.tier} cluster", f"{_unexpected(logs)}its logs are kept in {logs}"))


def _unexpected(logs: Path) -> str:
    """What the keeper has to say: servers that ended by themselves."""
    log = logs / "keeper.log"
    return log.read_text(errors="replace") if log.exists() else ""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for tier, reason in _not_run.items():
        terminalreporter.write_line(f"{tier} tier did NOT run: {reason}", red=True, bold=True)


def cluster_of(tier: str, config: pytest.Config, nodes: int | None = None) -> Iterator[Cluster]:
    """For fixtures. Not as many ``nodes`` as `NODES` says where images are too large for that."""
    if context := os.environ.get(CONTEXT):
        yield from _existing(tier, context)
        return
    require(tier)
    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        assets = _prepare(tier)
        running = launch.start(tier, NODES[tier] if nodes is None else nodes)
    info = running.info
    started = Cluster(
        tier, Path(info["kubeconfig"]), assets.binary("kubectl"), running.state, Path(info["audit_log"]), info["nodes"]
    )
    _started[tier] = started
    yield started
    running.stop()


def require(tier: str) -> None:
    """Skips the test, or with CI=true fails it, where the tier cannot run."""
    if reason := requirements.missing(tier):
        _not_run[tier] = reason
        requirements.not_here(f"{tier} tier: {reason}")


def _prepare(tier: str) -> Assets:
    assets = build.ensure(tier)
    if tier == "node":
        images.ensure_bases(assets)
    return assets


def _existing(tier: str, context: str) -> Iterator[Cluster]:
    """Someone's cluster, named on purpose. Only what the tests made in it is removed."""
    kubectl = build.ensure("api").binary("kubectl") if not locate().missing("api") else Path("kubectl")
    with tempfile.TemporaryDirectory(prefix="alignment-context-") as folder:
        kubeconfig = Path(folder) / "kubeconfig"
        view = [str(kubectl), "config", "view", "--minify", "--flatten", "--context", context]
        kubeconfig.write_text(subprocess.run(view, check=True, capture_output=True, text=True).stdout)
        cluster = Cluster(tier, kubeconfig, kubectl, Path(folder))
        cluster.nodes = [node["metadata"]["name"] for node in cluster.items("nodes")]
        yield cluster
        cluster.release()
