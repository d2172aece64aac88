"""The control plane: reads an AlignmentRun, decides what to do next, and has a backend do it. Imports no torch."""
