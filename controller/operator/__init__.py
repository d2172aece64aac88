"""The controller as a process in a cluster."""
