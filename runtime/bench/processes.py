"""Processes of a measurement: started, waited for, looked at, and ended with it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import sys
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path

from planner.domain.errors import EndpointFailed

__all__ = [
    "ALMANAC",
    "family",
    "free_ports",
    "open_files",
    "processor_s",
    "resident_mb",
    "started",
    "write_fleet",
]

ALMANAC = (sys.executable, "-m", "planner.cli.main")
"""The command, as this interpreter runs it."""
_START_LIMIT_S = 60.0
_STOP_LIMIT_S = 30.0
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE = resource.getpagesize()


@contextlib.asynccontextmanager
async def started(
    command: Sequence[str], log: Path, *, port: int | None = None, cwd: Path | None = None
) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a command while the block runs.

    Parameters
    ----------
    command
        Program and arguments.
    log
        Receives all that it says.
    port
        It is up when this port of loopback takes connections; None waits for a line ``ready``.
    cwd
        Folder to run in; the present one if None.

    Raises
    ------
    EndpointFailed
        If it ends or is not up in time; the message holds the end of its log.
    """
    with log.open("wb") as said:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": _path()},
        )
    try:
        await _up(process, log, port)
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), _STOP_LIMIT_S)
            except TimeoutError:
                process.kill()
                await process.wait()


def _path() -> str:
    """Return where the child finds this package, whatever folder it runs in."""
    here = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))


async def _up(process: asyncio.subprocess.Process, log: Path, port: int | None) -> None:
    end_s = time.monotonic() + _START_LIMIT_S
    while True:
        text = await asyncio.to_thread(log.read_text, errors="replace")
        if "\nready" in f"\n{text}" if port is None else await _listens(port):
            return
        if process.returncode is not None or time.monotonic() > end_s:
            raise EndpointFailed(f"a process did not start; its log ends: {text.strip()[-600:]}")
        await asyncio.sleep(0.05)


async def _listens(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


def free_ports(count: int) -> list[int]:
    """Return ports of loopback that nobody uses right now."""
    with contextlib.ExitStack() as opened:
        taken = [opened.enter_context(socket.socket()) for _ in range(count)]
        for one in taken:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in taken]


def write_fleet(
    folder: Path, ports: Iterable[int], *, slots: int = 64, kv_blocks: int = 200_000
) -> Path:
    """Write a fleet of equal H100s on loopback and return its file."""
    rows = "".join(
        f'  - {{id: e{index}, url: "http://127.0.0.1:{port}", model: m, gpu: H100, '
        f"latency: 8b-h100-1-bf16, kv_blocks: {kv_blocks}, slots: {slots}}}\n"
        for index, port in enumerate(ports)
    )
    path = folder / "fleet.yaml"
    path.write_text(f"schema: almanac.fleet/1\nname: bench\nworkers:\n{rows}", encoding="utf-8")
    return path


def family(pid: int) -> list[int]:
    """Return a process and those it has started, as far as the system tells."""
    found = [pid]
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    return found


def resident_mb(pids: Iterable[int]) -> float:
    """Return the resident set of processes, MB; those that are gone count nothing."""
    pages = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            pages += int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * _PAGE / 1e6


def processor_s(pids: Iterable[int]) -> float:
    """Return the processor seconds that processes have used, those that are gone left out."""
    ticks = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS_PER_S


def open_files(pid: int) -> int:
    """Return how many files and sockets a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208 - names are not looked at
