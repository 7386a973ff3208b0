"""Texts: files, tokens, tags and questions."""
