"""Errors, names, files and trees that every package uses; imports none of them."""
