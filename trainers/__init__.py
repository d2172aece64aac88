"""The data plane: phase programs that read a validated spec and leave an artifact."""
