"""Backends carry out what the planner asks for."""
