"""Many runs: populations in one process, and their tables."""
