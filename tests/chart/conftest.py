"""A cluster of real nodes for the chart alone: what other tests have installed would be in its way."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from cluster import build, fixtures, images, launch, product
from cluster.client import Cluster


@pytest.fixture(scope="module")
def fresh_cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    """One node with both images, and nothing of this project installed."""
    fixtures.require("node")
    with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        assets = build.ensure("node")
        images.ensure_bases(assets)
        running = launch.start("node", 1)
    try:
        info = running.info
        cluster = Cluster(
            "node",
            Path(info["kubeconfig"]),
            assets.binary("kubectl"),
            running.state,
            Path(info["audit_log"]),
            info["nodes"],
        )
        cluster.load_image(product.operator_image(assets, cluster.state / "images" / "operator.tar"))
        cluster.load_image(product.trainer_image(assets, cluster.state / "images" / "trainer.tar"))
        yield cluster
    finally:
        running.stop()
