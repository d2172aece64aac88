"""A cluster of its own, as the chart's tests have it."""

from chart.conftest import fresh_cluster

__all__ = ["fresh_cluster"]
