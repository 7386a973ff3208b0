"""Losses and metrics: functions of arrays."""
