"""The fixtures of the test clusters, for all tests; and who shares a process when several run the tests."""

from pathlib import Path

import pytest

pytest_plugins = ["cluster.fixtures", "cluster.installed"]

FIRST = ("node", "api")
"""The longest groups: they begin first."""


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share a cluster, or a file's fixtures, stay together (`pytest -n 3 --dist loadgroup`)."""
    groups = {item: _group(item) for item in items}
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
    items.sort(key=lambda item: FIRST.index(groups[item]) if groups[item] in FIRST else len(FIRST))


def _group(item: pytest.Item) -> str:
    names = getattr(item, "fixturenames", ())
    if "node_cluster" in names or "pipeline" in Path(item.path).parts:
        return "node"
    if "api_cluster" in names or "kwok_cluster" in names:
        return "api"
    return Path(item.path).name
