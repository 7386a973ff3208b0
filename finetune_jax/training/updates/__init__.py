"""Updates of a phase: programs, feeds of examples, logs, updates that are not finite."""
