"""Reward modelling."""
