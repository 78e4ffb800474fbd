"""The planner's process may be slow, silent, mad or dead: the gateway gets an error and goes on."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys

import pytest

from runtime.plan_process import PlanProcess, ProcessLimits, WorkerFailed

GOOD = """
import json, sys
for line in sys.stdin:
    question = json.loads(line)
    print(json.dumps({"beat": 0}), flush=True)
    print(json.dumps({"id": question["id"] - 1, "of": "an earlier question"}), flush=True)
    print(json.dumps({"id": question["id"], "pid": __import__("os").getpid()}), flush=True)
"""
SILENT = "import time\ntime.sleep(60)"
SLOW = """
import time
while True:
    print('{"beat": 1}', flush=True)
    time.sleep(0.01)
"""
CRASHING = "import sys\nsys.stdin.readline()\nsys.exit(3)"
GARBAGE = (
    "import sys\nsys.stdin.readline()\nprint('Traceback (most recent call last):', flush=True)"
)
LIST = "import sys\nsys.stdin.readline()\nprint('[1]', flush=True)"
STUBBORN = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SLOW


def question(number: int) -> bytes:
    return json.dumps({"id": number}).encode() + b"\n"


def process(code: str, **limits: float) -> PlanProcess:
    values = {"deadline_s": 10.0, "silence_s": 10.0, "pause_s": 1e-3, "stop_s": 0.3}
    return PlanProcess([sys.executable, "-c", code], ProcessLimits(**(values | limits)))


@pytest.mark.parametrize(
    ("code", "limits", "problem"),
    [
        (SILENT, {"silence_s": 0.2}, "silent"),
        (SLOW, {"deadline_s": 0.5}, "late"),
        (CRASHING, {}, "ended"),
        (GARBAGE, {}, "does not speak"),
        (LIST, {}, "does not speak"),
        ("", {}, "ended"),
    ],
)
def test_every_way_to_fail_is_told_and_leaves_no_process(code, limits, problem):
    """The error names the cause, the process is gone, and a pause comes before the next one."""

    async def fail():
        one = process(code, pause_s=60.0, **limits)
        try:
            with pytest.raises(WorkerFailed, match=problem):
                await one.ask(question)
            assert one.pid is None
            assert (one.starts, one.failures) == (1, 1)
            with pytest.raises(WorkerFailed, match="no process"):
                await one.ask(question)
            assert one.starts == 1
        finally:
            await one.aclose()

    asyncio.run(fail())


def test_a_command_that_cannot_be_started_is_a_failure():
    """A missing program is told like any other failure, not raised as an error of its own."""

    async def fail():
        one = PlanProcess(["/nonexistent/planner"])
        with pytest.raises(WorkerFailed):
            await one.ask(question)
        assert (one.starts, one.failures) == (0, 1)
        await one.aclose()

    asyncio.run(fail())


def test_answers_to_earlier_questions_are_dropped():
    """Each question gets its own answer, from one and the same process."""

    async def ask():
        one = process(GOOD)
        try:
            answers = [await one.ask(question) for _ in range(3)]
        finally:
            await one.aclose()
        assert [answer["id"] for answer in answers] == [1, 2, 3]
        assert len({answer["pid"] for answer in answers}) == 1
        assert one.starts == 1

    asyncio.run(ask())


def test_a_killed_process_is_started_again_and_pauses_double(until):
    """Kill -9 costs one start; failures in a row make the pause longer, a success forgets them."""

    async def ask():
        now = [0.0]
        one = PlanProcess(
            [sys.executable, "-c", GOOD],
            ProcessLimits(pause_s=4.0, most_pause_s=6.0),
            clock=lambda: now[0],
        )
        try:
            pid = (await one.ask(question))["pid"]
            starts, waits = [], []
            for _ in range(3):
                os.kill(one.pid, signal.SIGKILL)
                await until(lambda: one.pid is None)
                began = now[0]
                while not await one.ensure():
                    now[0] += 0.5
                starts.append(one.starts)
                waits.append(now[0] - began)
            assert (starts, waits) == ([2, 3, 4], [4.0, 6.0, 6.0])
            assert (await one.ask(question))["pid"] != pid
            assert one.failures == 0
        finally:
            await one.aclose()

    asyncio.run(ask())


def test_closing_ends_even_a_stubborn_process(until):
    """A process that ignores SIGTERM is killed; a cancelled question leaves nothing behind."""

    async def close():
        one = process(STUBBORN)
        asking = asyncio.create_task(one.ask(question))
        await until(lambda: one.pid is not None)
        pid = one.pid
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await one.aclose()
        assert one.pid is None
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)

    asyncio.run(close())
