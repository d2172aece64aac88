"""Phases as Kubeflow PyTorchJobs."""
