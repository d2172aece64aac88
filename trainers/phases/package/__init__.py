"""Packaging of models, metrics, plots, samples and the report."""
