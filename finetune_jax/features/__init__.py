"""Outputs of frozen stages and teachers, computed once and cached."""
