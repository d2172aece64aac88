"""Which step learns from what: stored teacher traces (off-policy) or the student's own samples (on-policy)."""

from dataclasses import dataclass
from fractions import Fraction


@dataclass(frozen=True)
class Streams:
    """Spreads the on-policy steps evenly, so their share is exact after any number of steps.

    GKD draws a coin instead; that share is right only on average, and ranks must draw the same coin.
    """

    on_policy_fraction: float

    def on_policy(self, step: int) -> bool:
        return self._on_policy_before(step + 1) > self._on_policy_before(step)

    def index(self, step: int) -> int:
        """How many earlier steps were of the same kind."""
        before = self._on_policy_before(step)
        return before if self.on_policy(step) else step - before

    def total_steps(self, steps: int) -> int:
        """Steps of both kinds until ``steps`` off-policy ones are done; if there is one kind only, as many as asked for."""
        off_policy = 1 - self._fraction
        # step - int(step x fraction) rounds step x (1 - fraction) up, and is ``steps`` as soon as that exceeds steps - 1.
        return int((steps - 1) / off_policy) + 1 if off_policy else steps

    def without_steps(self, total_steps: int) -> list[str]:
        """Prefixes of the metrics of streams that are wanted and that so few steps leave nothing to."""
        on_policy = sum(map(self.on_policy, range(total_steps)))
        asked = {"onPolicy": (self._fraction, on_policy), "offPolicy": (1 - self._fraction, total_steps - on_policy)}
        return [name for name, (share, steps) in asked.items() if share and not steps]

    @property
    def _fraction(self) -> Fraction:
        # In floats 100 x 0.29 is less than 29.
        return Fraction(self.on_policy_fraction).limit_denominator(1_000_000)

    def _on_policy_before(self, step: int) -> int:
        return int(step * self._fraction)
