"""Phases as jobs on a cluster, of whichever kind of Kubeflow's: what is particular to one is in a module of its own."""
