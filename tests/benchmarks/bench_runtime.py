"""Speed of gateway and mock endpoints; run by hand: ``python tests/benchmarks/bench_runtime.py``.

Gateway: added latency on one keep-alive connection and requests/s on eight, in front of servers
that answer at once. Mock: tokens/s beside a client, with the lateness of tokens. Server, gateway
and client are processes of their own and share the machine.
"""

# ruff: noqa: T201, S603, ASYNC220 - a script run by hand
from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BODY = json.dumps(
    {"model": "m", "messages": [{"role": "user", "content": "word " * 200}], "max_tokens": 8}
).encode()
ANSWER = json.dumps(
    {
        "id": "x", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "hi"},
                     "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 200, "completion_tokens": 1, "total_tokens": 201},
    }
).encode()  # fmt: skip


class Instant(asyncio.Protocol):
    """An HTTP server that answers every request at once."""

    def connection_made(self, transport):
        self._transport = transport
        self._data = b""

    def data_received(self, data):
        self._data += data
        while (end := self._data.find(b"\r\n\r\n")) >= 0:
            head = self._data[:end].lower()
            length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0] or 0)
            if len(self._data) < end + 4 + length:
                return
            self._data = self._data[end + 4 + length :]
            self._transport.write(
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                % len(ANSWER)
                + ANSWER
            )


async def instant(port):
    server = await asyncio.get_running_loop().create_server(Instant, "127.0.0.1", port)
    await server.serve_forever()


async def hammer(port, requests):
    """Send requests one after the other on one connection; return the seconds of each."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(BODY)}\r\n\r\n"
    ).encode()
    times = []
    for _ in range(requests):
        started = time.perf_counter()
        writer.write(head + BODY)
        answer = await reader.readuntil(b"\r\n\r\n")
        assert b" 200 " in answer[:20]
        length = int(answer.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        await reader.readexactly(length)
        times.append(time.perf_counter() - started)
    writer.close()
    return times


def quantile(values, level):
    return sorted(values)[min(len(values) - 1, int(level * len(values)))]


def fleet_file(folder, ports, slots=64):
    path = Path(folder) / "fleet.yaml"
    rows = "\n".join(
        f'  - {{id: e{i}, url: "http://127.0.0.1:{port}", model: m, gpu: H100, '
        f"latency: 8b-h100-1-bf16, kv_blocks: 20000, slots: {slots}}}"
        for i, port in enumerate(ports)
    )
    path.write_text(f"schema: almanac.fleet/1\nname: bench\nworkers:\n{rows}\n")
    return path


def almanac(*words):
    return subprocess.Popen(
        [sys.executable, "-m", "planner.cli.main", *map(str, words)],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


async def bench_gateway(folder):
    ports = [9301, 9302, 9303]
    servers = [subprocess.Popen([sys.executable, __file__, "instant", str(p)]) for p in ports]
    await asyncio.sleep(1.0)
    try:
        for policy in ("round_robin", "marginal_cost"):
            gateway = almanac(
                "serve", fleet_file(folder, ports), "--port", 9300, "--policy", policy
            )
            gateway.stderr.readline()
            try:
                await hammer(9300, 500)
                direct = await hammer(9301, 3000)
                through = await hammer(9300, 3000)
                started = time.perf_counter()
                await asyncio.gather(*(hammer(9300, 1000) for _ in range(8)))
                rate = 8000 / (time.perf_counter() - started)
                added = [1e3 * (quantile(through, q) - quantile(direct, q)) for q in (0.5, 0.99)]
                print(
                    f"gateway {policy}: added p50 {added[0]:.2f} ms, p99 {added[1]:.2f} ms "
                    f"(direct p50 {quantile(direct, 0.5) * 1e3:.2f} ms); {rate:.0f} requests/s "
                    "on 8 connections"
                )
            finally:
                gateway.terminate()
                gateway.communicate()
    finally:
        for server in servers:
            server.terminate()
            server.wait()


async def read_stream(port, tokens):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps(
        {
            "model": "m", "stream": True, "messages": [{"role": "user", "content": f"w {tokens}"}],
            "vllm_xargs": {"mock_output_tokens": tokens},
        }
    ).encode()  # fmt: skip
    writer.write(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
        + body
    )
    size = 0
    while data := await reader.read(65536):
        size += len(data)
    writer.close()
    return size


async def bench_mock(folder):
    ports = [9311, 9312, 9313, 9314, 9315]
    fleet = fleet_file(folder, ports)
    for interval in (1, 4):
        for streams, dilation in ((5, 4), (10, 4), (20, 4), (40, 4)):
            mock = almanac(
                "mock-fleet", fleet, "--dilation", dilation, "--stream-interval", interval
            )
            mock.stderr.readline()
            tokens = 1500
            started = time.perf_counter()
            await asyncio.gather(
                *(read_stream(port, tokens) for port in ports for _ in range(streams))
            )
            wall_s = time.perf_counter() - started
            mock.terminate()
            rows = [json.loads(line) for line in mock.communicate()[0].splitlines()]
            print(
                f"mock interval {interval}: 5 x {streams} streams at dilation {dilation}: "
                f"{5 * streams * tokens / wall_s:.0f} tokens/s, late p50 "
                f"{max(row['late_p50_ms'] for row in rows):.1f} ms, p99 "
                f"{max(row['late_p99_ms'] for row in rows):.1f} ms"
            )


def main():
    if sys.argv[1:2] == ["instant"]:
        asyncio.run(instant(int(sys.argv[2])))
        return
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(bench_gateway(folder))
        asyncio.run(bench_mock(folder))
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
