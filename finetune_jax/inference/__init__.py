"""A finished run on new inputs, here (predict) and elsewhere (export)."""
