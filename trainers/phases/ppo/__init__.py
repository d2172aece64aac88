"""Proximal policy optimization against a reward model."""
