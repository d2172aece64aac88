"""The fixtures of the test clusters, and of what Prometheus sees of them, for all tests."""

import os

from hypothesis import settings

# Results must not depend on how a sum is split over threads, and the tests share their cores. OpenMP reads it once, when torch is
# first imported: told later, every thread in which a test computes keeps a team of its own.
os.environ["OMP_NUM_THREADS"] = "1"

pytest_plugins = ["cluster.fixtures", "cluster.installed", "monitoring.observed"]

# Tests have no time limits of their own: beside a cluster that starts, anything takes longer than usual.
settings.register_profile("untimed", settings(), deadline=None)
settings.load_profile("untimed")
