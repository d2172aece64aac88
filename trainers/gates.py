"""Thresholds on a phase's final metrics. Imports no torch."""

from trainers.contract import BadInput, GateFailed
from trainers.spec import PhaseSpec


def check_gates(spec: PhaseSpec, metrics: dict[str, float]) -> None:
    """Raise GateFailed naming every metric that missed its threshold, BadInput for a metric that does not exist."""
    missed = []
    for gate in spec.gates:
        if gate.metric not in metrics:
            raise BadInput(f"gates: no metric {gate.metric!r}; this phase has {', '.join(sorted(metrics)) or 'none'}")
        value = metrics[gate.metric]
        # Written so that NaN misses both bounds.
        if gate.at_least is not None and not value >= gate.at_least:
            missed.append(f"{gate.metric} is {value:.4g}, must be at least {gate.at_least:g}")
        if gate.at_most is not None and not value <= gate.at_most:
            missed.append(f"{gate.metric} is {value:.4g}, must be at most {gate.at_most:g}")
    if missed:
        raise GateFailed("gate missed: " + "; ".join(missed))
