"""What a workflow graph means in time: scenario sampling, ranks, critical paths, visits."""
