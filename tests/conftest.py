"""The fixtures of the test clusters, and of what Prometheus sees of them, for all tests."""

from hypothesis import settings

pytest_plugins = ["cluster.fixtures", "cluster.installed", "monitoring.observed"]

# Tests have no time limits of their own: beside a cluster that starts, anything takes longer than usual.
settings.register_profile("untimed", settings(), deadline=None)
settings.load_profile("untimed")
