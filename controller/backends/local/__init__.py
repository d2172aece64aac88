"""Phases as processes on this machine."""
