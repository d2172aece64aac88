"""A real Kubernetes on one machine for the tests, without a registry or a container engine. See README.md here."""
