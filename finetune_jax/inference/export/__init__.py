"""Exports: what is written of a run for programs that do not have this one."""
