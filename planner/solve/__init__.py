"""Fleet plans by CP-SAT: instance, model, heuristic, bounds, prices; OR-Tools only here."""
