"""How many paced tokens per second mock endpoints hand out beside their client.

The mock fleet is a process of its own; the client here reads its streams with no HTTP library, so
that what is measured is the server as far as possible. Both share the machine.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from planner.domain.errors import EndpointFailed

__all__ = ["MockSpeed", "measure"]

_HEAD = b"data: {"
_START_LIMIT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class MockSpeed:
    """What was measured.

    Parameters
    ----------
    tokens_per_s
        Tokens over the wall time from the first request to the end of the last answer.
    own_chunk_ratio
        Share of the tokens that came in a chunk of their own; late ones come several at a time.
    late_p50_ms, late_p99_ms
        How late tokens were handed out, of the endpoint where they were latest.
    stretch
        Wall time over the time that the engines themselves took.
    """

    tokens_per_s: float
    own_chunk_ratio: float
    late_p50_ms: float
    late_p99_ms: float
    stretch: float


async def measure(*, endpoints: int, streams: int, tokens: int) -> MockSpeed:
    """Stream answers from a mock fleet of H100s in real time, one token a chunk.

    Parameters
    ----------
    endpoints, streams
        Endpoints, and streams at each at the same time.
    tokens
        Length of each answer.

    Raises
    ------
    EndpointFailed
        If the mock fleet does not start, or an answer is not whole.
    """
    ports = _free_ports(endpoints)
    with tempfile.TemporaryDirectory() as folder:
        fleet = Path(folder) / "fleet.yaml"
        fleet.write_text(_fleet(ports, streams), encoding="utf-8")
        server = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "planner.cli.main", "mock-fleet", str(fleet),
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            assert server.stderr is not None  # noqa: S101 - asked for
            async with asyncio.timeout(_START_LIMIT_S):
                line = (await server.stderr.readline()).decode()
            if not line.startswith("ready"):
                raise EndpointFailed(f"the mock fleet did not start: {line.strip()}")
            await asyncio.gather(*(_read(port, 2, 0) for port in ports))
            started_s = time.perf_counter()
            chunks = await asyncio.gather(
                *(_read(port, tokens, number) for port in ports for number in range(streams))
            )
            wall_s = time.perf_counter() - started_s
            seconds = [await _engine_s(port) for port in ports]
        finally:
            if server.returncode is None:
                server.terminate()
            out, _ = await server.communicate()
    stats = [json.loads(row) for row in out.splitlines()]
    total = len(chunks) * tokens
    return MockSpeed(
        tokens_per_s=total / wall_s,
        # A chunk of two tokens is one too few.
        own_chunk_ratio=max(0.0, 1.0 - 2.0 * (total - sum(chunks)) / total),
        late_p50_ms=max(row["late_p50_ms"] for row in stats),
        late_p99_ms=max(row["late_p99_ms"] for row in stats),
        stretch=wall_s / max(seconds),
    )


def _free_ports(count: int) -> list[int]:
    taken = [socket.socket() for _ in range(count)]
    try:
        for one in taken:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in taken]
    finally:
        for one in taken:
            one.close()


def _fleet(ports: list[int], slots: int) -> str:
    rows = "".join(
        f'  - {{id: e{index}, url: "http://127.0.0.1:{port}", model: m, gpu: H100, '
        f"latency: 8b-h100-1-bf16, kv_blocks: 20000, slots: {slots}}}\n"
        for index, port in enumerate(ports)
    )
    return f"schema: almanac.fleet/1\nname: bench\nworkers:\n{rows}"


async def _read(port: int, tokens: int, number: int) -> int:
    """Read one stream to its end; return its chunks, the opening one left out."""
    payload: dict[str, Any] = {
        "model": "m",
        "stream": True,
        "messages": [{"role": "user", "content": f"stream {number}"}],
        "vllm_xargs": {"mock_output_tokens": tokens},
    }
    data = await _ask(port, "POST", "/v1/chat/completions", json.dumps(payload).encode())
    if b"data: [DONE]" not in data:
        raise EndpointFailed(f"an answer is not whole: {data[:200]!r}")
    return data.count(_HEAD) - 1


async def _engine_s(port: int) -> float:
    """Return the longest time from arrival to end that the engine's metrics allow to tell."""
    text = (await _ask(port, "GET", "/metrics", b"")).decode()
    values = {
        name: float(line.split()[-1])
        for line in text.splitlines()
        for name in ("sum", "count")
        if line.startswith(f"vllm:e2e_request_latency_seconds_{name}{{")
    }
    # The warm-up answer was short; the others ran side by side for the same time.
    return values["sum"] / max(1.0, values["count"] - 1)


async def _ask(port: int, method: str, path: str, body: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(
            f"{method} {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
            + body
        )
        parts = []
        while part := await reader.read(65536):
            parts.append(part)
        return b"".join(parts)
    finally:
        writer.close()
