"""Evaluation of every model on every benchmark."""
