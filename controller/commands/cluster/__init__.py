"""`alignctl status`, `logs`, `stop` and `resume` of runs in a cluster, with the rights and the kubeconfig of who calls them."""
