"""Random requests against a gateway's own OpenAPI description: no 500, no hang, usual errors.

Each request begins as one that the description allows; most are then spoilt: odd values in place of
right ones, bytes that are no JSON, far too deep or too long, header values that are no text. What
comes back is held against what the description promises. The same seed gives the same requests.

They go over bare sockets, one connection each: no client library would send half of them.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from planner import __version__
from runtime.bench.figures import Figure
from runtime.bench.processes import ALMANAC, free_ports, started, write_fleet
from runtime.openapi import openapi

__all__ = ["Finding", "Findings", "Probe", "fuzz", "fuzz_figures", "fuzz_gateway", "probes"]

_KEY = "fuzz"

_ODD: Sequence[Any] = (
    None, True, False, -1, 0, 3, 2.5, 1e308, 10**40, -(10**25), "", "a", "a b", "\x00", "\ud800",
    "é" * 50, "x" * 5000, [], [1], ["a"], [[[]]], [None], {}, {"role": "user"}, {"a": {"b": []}},
)  # fmt: skip
_RAW: Sequence[bytes] = (
    b"", b"{", b"[]", b"null", b"3", b'"text"', b"\xff\xfe\x00", b"{}{}", b"[" * 50_000,
    b'{"model": ' + b"[" * 3000 + b"]" * 3000 + b"}", b'{"max_tokens": ' + b"9" * 5000 + b"}",
    b'{"max_tokens": 1e999}', b'{"max_tokens": NaN}', b'{"a": "\\ud800"}', b'{"a": 1, "a": 2}',
    b"\xef\xbb\xbf{}", b'{"messages": "' + b"\xc3\x28" + b'"}',
)  # fmt: skip
_EXTRA = (
    "stream_options", "user", "session_params", "prompt_cache_key", "previous_response_id",
    "vllm_xargs", "nvext", "cache_salt", "tools", "priority", "n", "stop", "temperature",
    "unheard_of",
)  # fmt: skip
_NAMES = (
    b"x-request-id", b"x-session-id", b"x-almanac-visit", b"x-almanac-priority",
    b"x-almanac-run-id", b"x-almanac-deadline-s", b"traceparent", b"content-type",
    b"accept-encoding", b"x-other", b"authorization", b"transfer-encoding", b"content-encoding",
    b"expect",
)  # fmt: skip
_VALUES = (
    b"", b"\xff\xfe", b"\xc3\xa9\xff", b"9" * 400, b"-1", b"1e999", b"Bearer \xff", b"00-\xff",
    b"\xd9\xa3", b"a" * 3000, b"gzip", b"chunked", b"nan", b"\x01", b"text/plain",
)  # fmt: skip
_METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "BREW")
_USUAL = frozenset({400, 404, 405, 413, 414, 417, 431})
"""What any route may answer to what is no proper request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """One request.

    Parameters
    ----------
    route
        The path as the description has it.
    known
        Statuses that the description names for it; empty where it has no such operation.
    plain
        Whether it is as the description allows.
    """

    method: str
    route: str
    path: str
    headers: tuple[tuple[bytes, bytes], ...]
    body: bytes
    known: frozenset[int] = frozenset()
    plain: bool = False

    def wire(self) -> bytes:
        """Return the bytes to send."""
        own = {name for name, _ in self.headers}
        rows = [(b"host", b"fuzz"), (b"connection", b"close"), *self.headers]
        if self.body and b"transfer-encoding" not in own:
            rows.append((b"content-length", b"%d" % len(self.body)))
        head = b"".join(b"%s: %s\r\n" % row for row in rows)
        return f"{self.method} {self.path} HTTP/1.1\r\n".encode() + head + b"\r\n" + self.body


@dataclass(frozen=True, slots=True)
class Finding:
    """What was wrong with an answer: ``server_error``, ``hang``, ``form`` or ``undocumented``."""

    kind: str
    probe: Probe
    detail: str

    def __str__(self) -> str:
        return (
            f"{self.kind}: {self.probe.method} {self.probe.route} {self.detail}; "
            f"headers {self.probe.headers!r:.200}, body {self.probe.body[:120]!r}"
        )


@dataclass(slots=True)
class Findings:
    """How a fuzzing run went.

    Parameters
    ----------
    slowest_s
        Longest time to an answer's end, wall seconds.
    """

    statuses: Counter[int] = field(default_factory=Counter)
    found: list[Finding] = field(default_factory=list)
    slowest_s: float = 0.0

    def count(self, kind: str) -> int:
        """Return the findings of a kind."""
        return sum(one.kind == kind for one in self.found)


def probes(
    document: Mapping[str, Any], rng: random.Random, count: int, *, admin_key: str | None = None
) -> Iterator[Probe]:
    """Yield random requests to the operations of an OpenAPI document, every one in turn.

    ``admin_key`` opens, in three of four requests, what asks for one.
    """
    operations = [
        (method.upper(), route, operation)
        for route, item in document["paths"].items()
        for method, operation in item.items()
        if method != "parameters"
    ]
    for number in range(count):
        method, route, operation = operations[number % len(operations)]
        yield _probe(method, route, operation, rng, admin_key)


def _probe(
    method: str,
    route: str,
    operation: Mapping[str, Any],
    rng: random.Random,
    admin_key: str | None,
) -> Probe:
    known = frozenset(int(status) for status in operation["responses"])
    names = ("e0", "m", "a b", "..", "%00", "é", "x" * 300, "\ud800")
    part = quote(rng.choice(names), errors="surrogatepass")
    path = route.replace("{id}", part)
    headers: list[tuple[bytes, bytes]] = []
    if admin_key and {"admin": []} in operation.get("security", ()) and rng.random() < 0.75:
        headers.append((b"authorization", f"Bearer {admin_key}".encode()))
    body = b""
    plain = True
    if "requestBody" in operation:
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        payload = _value(schema, rng)
        if "model" in payload and rng.random() < 0.8:
            payload |= {"model": "m", "max_tokens": 2}
        for _ in range(rng.choice((0, 0, 1, 1, 2))):
            plain = False
            _spoil(payload, rng)
        body = json.dumps(payload).encode()
    if rng.random() < 0.2:
        plain, body = False, rng.choice(_RAW)
    if rng.random() < 0.3:
        plain = False
        headers.append((rng.choice(_NAMES), rng.choice(_VALUES)))
    if rng.random() < 0.05:
        plain, known, method = False, frozenset(), rng.choice(_METHODS)
    if rng.random() < 0.03:
        plain, known, path = False, frozenset(), path + rng.choice(("/x", "?q=%ff", "x" * 9000))
    return Probe(
        method=method,
        route=route,
        path=path,
        headers=tuple(headers),
        body=body,
        known=known,
        plain=plain,
    )


def _spoil(value: Any, rng: random.Random) -> None:
    """Put something odd into an object, at its top or inside."""
    while True:
        places: Sequence[Any] = range(len(value)) if isinstance(value, list) else (*value, *_EXTRA)
        place = rng.choice(places)
        inner = value[place] if isinstance(value, list) else value.get(place)
        if not (isinstance(inner, (dict, list)) and inner) or rng.random() < 0.3:
            value[place] = deepcopy(rng.choice(_ODD))
            return
        value = inner


def _value(schema: Mapping[str, Any], rng: random.Random) -> Any:
    """Return a value that a schema allows."""
    if "enum" in schema:
        return rng.choice(schema["enum"])
    if "oneOf" in schema:
        return _value(rng.choice(schema["oneOf"]), rng)
    make: Mapping[str, Callable[[], Any]] = {
        "object": lambda: {
            name: _value(inner, rng)
            for name, inner in schema.get("properties", {}).items()
            if name in schema.get("required", ()) or rng.random() < 0.6
        },
        "array": lambda: [
            _value(schema["items"], rng) for _ in range(rng.randint(schema.get("minItems", 0), 3))
        ],
        "string": lambda: rng.choice(("a", "user", "some words of text", "é")),
        "integer": lambda: rng.randint(schema.get("minimum", -5), 9),
        "boolean": lambda: rng.random() < 0.5,
    }
    kind = schema.get("type")
    return deepcopy(rng.choice(_ODD)) if kind is None else make[kind]()


async def fuzz(
    port: int,
    requests: Iterator[Probe],
    *,
    at_once: int = 16,
    limit_s: float = 20.0,
) -> Findings:
    """Send requests to a port of loopback and return what was wrong with the answers.

    Parameters
    ----------
    at_once
        Connections at a time.
    limit_s
        Wall seconds after which an answer that is not complete counts as a hang.
    """
    findings = Findings()

    async def work() -> None:
        for probe in requests:
            begun_s = time.perf_counter()
            try:
                async with asyncio.timeout(limit_s):
                    answer = await _send(port, probe)
            except TimeoutError:
                findings.found.append(Finding("hang", probe, f"no end in {limit_s:g} s"))
            except OSError as error:
                findings.found.append(Finding("hang", probe, f"no answer: {error!r}"))
            else:
                findings.slowest_s = max(findings.slowest_s, time.perf_counter() - begun_s)
                _judge(probe, answer, findings)

    await asyncio.gather(*(work() for _ in range(at_once)))
    return findings


async def fuzz_gateway(folder: Path, count: int, seed: int) -> Findings:
    """Send random requests to a gateway in front of mock endpoints, admin routes included."""
    ports = free_ports(3)
    fleet = write_fleet(folder, ports[1:])
    mock = [*ALMANAC, "mock-fleet", str(fleet), "--dilation", "50"]
    gateway = [
        *ALMANAC, "serve", str(fleet), "--port", str(ports[0]), "--dilation", "50",
        "--policy", "marginal_cost", "--admin-key", _KEY,
    ]  # fmt: skip
    async with (
        started(mock, folder / "mock.log"),
        # Requests may name files for traces; those are made where the gateway runs.
        started(gateway, folder / "gateway.log", cwd=folder),
    ):
        document = openapi(__version__)
        return await fuzz(ports[0], probes(document, random.Random(seed), count, admin_key=_KEY))


def fuzz_figures(findings: Findings) -> Iterator[Figure]:
    """Yield the figures of a fuzzing run."""
    yield Figure.of("fuzz_answers", findings.statuses.total(), "")
    for kind in ("server_error", "hang", "form", "undocumented"):
        yield Figure.at_most(f"fuzz_{kind}", findings.count(kind), "", 0)
    yield Figure.of("fuzz_slowest_answer", findings.slowest_s, "s")


async def _send(port: int, probe: Probe) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(probe.wire())
        return await reader.read(-1)
    except ConnectionResetError:
        # The answer to a body that was not wanted may be lost when the rest of it still comes.
        if len(probe.body) > 2**15:
            return b""
        raise
    finally:
        writer.close()


def _judge(probe: Probe, answer: bytes, findings: Findings) -> None:
    def found(kind: str, detail: str) -> None:
        findings.found.append(Finding(kind, probe, detail))

    if not answer and len(probe.body) > 2**15:
        return
    head, _, body = answer.partition(b"\r\n\r\n")
    try:
        status = int(head.split()[1])
    except (IndexError, ValueError):
        found("form", f"no HTTP: {answer[:80]!r}")
        return
    findings.statuses[status] += 1
    if status == 500:
        found("server_error", f"{body[:200]!r}")
    elif status >= 400 and probe.method != "HEAD" and (problem := _form(head, body, status)):
        found("form", problem)
    if probe.known and status not in probe.known and (probe.plain or status not in _USUAL):
        found("undocumented", f"{status} {body[:120]!r}")


def _form(head: bytes, body: bytes, status: int) -> str:
    """Return what is wrong with an error's form, or nothing."""
    if b"content-type: application/json" not in head.lower():
        return f"{status} without JSON: {body[:80]!r}"
    try:
        error = json.loads(body)["error"]
        well = isinstance(error["message"], str) and isinstance(error["type"], str)
        well = well and error["code"] == status and "param" in error
    except (ValueError, KeyError, TypeError):
        well = False
    return "" if well else f"{status} with the body {body[:120]!r}"
