"""What a user can set for packaging."""

from trainers.spec import PhaseSpec


class PackageSpec(PhaseSpec):
    """Exports and report of everything the run left."""
