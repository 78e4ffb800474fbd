"""Frozen records shared by all rooms: workflow, fleet, estimates, plan, trace, runs, errors."""
