"""A loopback server that answers like a model and like the gateway, and records what it hears."""

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


@dataclass
class Stub:
    """What the server was asked; ``status`` is what it answers to workflows and events."""

    url: str = ""
    status: int = 200
    calls: list[tuple[dict[str, str], dict[str, Any]]] = field(default_factory=list)
    workflows: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)

    def headers(self, name: str) -> list[str | None]:
        """Return one header of all calls, in order of arrival."""
        return [headers.get(name) for headers, _ in self.calls]


def words_of(body: dict[str, Any]) -> str:
    """Return the scripted answer: ``mock_output_tokens`` words, the first from ``mock_reply``."""
    mock = body.get("vllm_xargs", {})
    words = [f"w{i}" for i in range(int(mock.get("mock_output_tokens", 3)))]
    return " ".join([mock["mock_reply"], *words[1:]] if "mock_reply" in mock else words)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    stub: Stub

    def log_message(self, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/v1/chat/completions":
            self.stub.calls.append(({k.lower(): v for k, v in self.headers.items()}, body))
            self.complete(body)
            return
        if self.stub.status == 200:
            if self.path == "/almanac/v1/workflows":
                self.stub.workflows.append(body)
            else:
                self.stub.events += body["events"]
        self.answer(self.stub.status, "application/json", b"{}")

    def complete(self, body: dict[str, Any]) -> None:
        text = words_of(body)
        common = {"id": "c", "created": 1, "model": body["model"]}
        if not body.get("stream"):
            message = {"role": "assistant", "content": text}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            document = {**common, "object": "chat.completion", "choices": [choice]}
            self.answer(200, "application/json", json.dumps(document).encode())
            return
        words = text.split(" ")
        pieces = [" ".join(words[i : i + 4]) + " " for i in range(0, len(words), 4)]
        deltas: list[tuple[dict[str, Any], str | None]] = [
            *(({"role": "assistant", "content": piece}, None) for piece in pieces),
            ({}, "stop"),
        ]
        lines = [
            json.dumps(
                {
                    **common,
                    "object": "chat.completion.chunk",
                    "choices": [{"index": 0, "delta": delta, "finish_reason": reason}],
                }
            )
            for delta, reason in deltas
        ]
        stream = "".join(f"data: {line}\n\n" for line in [*lines, "[DONE]"])
        self.answer(200, "text/event-stream", stream.encode())

    def answer(self, status: int, kind: str, payload: bytes) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.send_header("content-length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)


@pytest.fixture
def stub() -> Iterator[Stub]:
    """Yield a running server with an empty record."""
    record = Stub()
    handler = type("BoundHandler", (Handler,), {"stub": record})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    record.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield record
    server.shutdown()
    thread.join()
    server.server_close()
