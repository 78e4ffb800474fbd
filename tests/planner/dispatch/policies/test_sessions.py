"""Whose text a piece of prompt is."""

import random

from planner.dispatch.events import Call
from planner.dispatch.policies.sessions import Sessions


def test_the_largest_context_is_that_of_the_runs_under_way() -> None:
    """Each run counts with its latest call; a run that has ended counts no more."""
    draw = random.Random(3)
    sessions, latest = Sessions(), dict[str, int]()
    for number in range(2000):
        run = f"r{draw.randrange(12)}"
        if draw.random() < 0.2 and run in latest:
            sessions.ended(run)
            del latest[run]
            continue
        latest[run] = draw.randrange(1, 500)
        sessions.arrived(Call(call_id=str(number), run_id=run, prompt_tokens=latest[run]))
        assert sessions.largest_tokens == max(latest.values())
