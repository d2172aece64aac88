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

    def _on_policy_before(self, step: int) -> int:
        # In floats 100 x 0.29 is less than 29.
        return int(step * Fraction(self.on_policy_fraction).limit_denominator(1_000_000))
