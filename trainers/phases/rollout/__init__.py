"""Teacher rollouts."""
