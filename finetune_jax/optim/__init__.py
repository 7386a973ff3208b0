"""The optax transformation of a phase: algorithms, schedules, clipping, regularisers."""
