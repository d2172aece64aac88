"""The fixtures of the test clusters, and of what Prometheus sees of them, for all tests."""

pytest_plugins = ["cluster.fixtures", "cluster.installed", "monitoring.observed"]
