"""The data plane: phase programs that read a validated spec and leave an artifact."""

__version__ = "0.1.0"
