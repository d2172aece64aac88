"""The planner: from a run and what is observed to a status and actions. Pure: no clock, environment or I/O."""
