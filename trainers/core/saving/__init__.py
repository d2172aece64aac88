"""Checkpoints on disk: staging in memory, the folder's format, the thread that writes it."""
