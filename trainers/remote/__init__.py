"""A workspace, data and models on an object store. Imports no torch."""
