"""Studies: what is compared, on what fleets, work and loads, and what came of it."""
