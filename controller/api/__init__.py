"""The AlignmentRun resource: the one source of the CRD, the JSON schema, the reference page and the command line."""
