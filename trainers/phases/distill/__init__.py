"""Reward-weighted on-policy distillation."""
