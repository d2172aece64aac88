"""The fixtures of the test clusters, for all tests."""

pytest_plugins = ["cluster.fixtures", "cluster.installed"]
