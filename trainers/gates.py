"""Thresholds on a phase's final metrics. Imports no torch."""

from collections.abc import Iterable, Iterator, Mapping

from trainers.contract import BadInput, GateFailed
from trainers.spec import Gate, PhaseSpec


def check_gates(gates: Iterable[Gate], metrics: Mapping[str, float]) -> None:
    """Raise GateFailed naming every metric that missed its threshold, or has no value to meet it with."""
    if found := missed(gates, metrics):
        raise GateFailed(found)


def check_metrics(spec: PhaseSpec) -> None:
    """Raise BadInput for a gate on a metric that the phase cannot have, before anything is computed."""
    known = spec.final_metrics()
    for gate in spec.gates:
        if known and gate.metric not in known:
            raise BadInput(f"gates: no metric {gate.metric!r}; this phase has {', '.join(known)}")


def missed(gates: Iterable[Gate], metrics: Mapping[str, float]) -> str:
    """The gates that these metrics miss, in one line; empty if they meet all."""
    found = [problem for gate in gates for problem in _problems(gate, metrics)]
    return "gate missed: " + "; ".join(found) if found else ""


def has_figures(gates: Iterable[Gate], metrics: Mapping[str, float]) -> bool:
    """Whether every gate can be judged."""
    return all(gate.metric in metrics for gate in gates)


def _problems(gate: Gate, metrics: Mapping[str, float]) -> Iterator[str]:
    value = metrics.get(gate.metric)
    if value is None:
        yield f"{gate.metric} has no value; there are {', '.join(sorted(metrics)) or 'none'}"
        return
    # Written so that NaN misses both bounds.
    if gate.at_least is not None and not value >= gate.at_least:
        yield f"{gate.metric} is {value:.4g}, must be at least {gate.at_least:g}"
    if gate.at_most is not None and not value <= gate.at_most:
        yield f"{gate.metric} is {value:.4g}, must be at most {gate.at_most:g}"
