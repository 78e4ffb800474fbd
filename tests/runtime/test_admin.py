"""Admin routes, the shape of all answers, and the gateway's description of itself."""

from __future__ import annotations

import asyncio
import json
import ssl
import subprocess

import httpx
import pytest

from planner.domain.errors import InvalidInput
from runtime.control import Control
from runtime.diagnostics import metrics_text
from runtime.gateway import Gateway, tls_context
from runtime.openapi import openapi

ADMIN = {"authorization": "Bearer secret"}
CLOSE = b"host: a\r\nconnection: close\r\n"
CALL = {"model": "m", "prompt": "a", "max_tokens": 2}


def worker(name, url, **changes):
    row = {"id": name, "url": url, "model": "m", "gpu": "H100", "latency": "8b-h100-1-bf16"}
    return {**row, "kv_blocks": 500, "slots": 4, **changes}


@pytest.fixture
async def http_of():
    clients = []

    def made(s, **options):
        clients.append(httpx.AsyncClient(base_url=s.gateway.address, **options))
        return clients[-1]

    yield made
    for client in clients:
        await client.aclose()


async def used(http, count):
    """Return the endpoints that served some calls, all of which went well."""
    answers = [await http.post("/v1/completions", json=CALL) for _ in range(count)]
    assert {answer.status_code for answer in answers} == {200}
    return {answer.headers["x-almanac-endpoint"] for answer in answers}


async def test_workers_come_and_go_while_serving(stack, http_of, until):
    """An added worker serves once it is well, a removed one gets nothing more, and can return."""
    async with stack(2) as s:
        http, admin = http_of(s), http_of(s, headers=ADMIN)
        second = s.mock.addresses[1]
        assert await used(http, 4) == {"e0", "e1"}
        gone = await admin.delete("/workers/e1")
        assert (gone.status_code, gone.json()) == (200, {"id": "e1"})
        assert await used(http, 4) == {"e0"}
        assert 'almanac_worker_health{endpoint="e1"}' not in metrics_text(s.control)
        added = await admin.post("/workers", json=worker("fresh", second))
        assert (added.status_code, added.json()) == (201, {"id": "fresh"})
        await until(lambda: s.control.router.view.states[2].healthy, 0.005)
        assert await used(http, 4) == {"e0", "fresh"}
        listed = (await admin.get("/workers")).json()["workers"]
        assert [one["id"] for one in listed] == ["e0", "fresh"]
        assert (await admin.delete("/workers/fresh")).status_code == 200
        assert (await admin.post("/workers", json=worker("e1", second))).status_code == 201
        await until(lambda: s.control.router.view.states[1].healthy, 0.005)
        assert await used(http, 4) == {"e0", "e1"}
        text = metrics_text(s.control)
        assert 'almanac_worker_health{endpoint="e1"} 1' in text


async def test_a_drained_worker_finishes_what_it_has(stack, http_of, until):
    """A drain sends no new calls and cuts none off; taken back, calls come again."""
    async with stack(2) as s:
        http, admin = http_of(s, timeout=20), http_of(s, headers=ADMIN)
        long = asyncio.create_task(
            http.post("/v1/completions", json={**CALL, "max_tokens": 2000, "ignore_eos": True})
        )
        await until(lambda: s.control.router.in_flight == 1, 0.001)
        (busy,) = (state for state in s.control.router.view.states if state.in_flight)
        name = busy.endpoint.id
        answer = await admin.post(f"/workers/{name}/drain")
        assert answer.json() == {"id": name, "in_flight": 1}
        assert name not in await used(http, 4)
        assert (await long).status_code == 200
        assert (await admin.delete(f"/workers/{name}/drain")).status_code == 200
        assert name in await used(http, 4)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/workers", {"id": "x"}, 400),
        ("POST", "/workers", worker("e0", "http://127.0.0.1:1"), 409),
        ("POST", "/workers", worker("x", "ftp://127.0.0.1:1"), 400),
        ("POST", "/workers", worker("x", None), 400),
        ("DELETE", "/workers/nobody", None, 404),
        ("DELETE", "/workers/e0", None, 409),
        ("POST", "/workers/nobody/drain", None, 404),
    ],
)
async def test_bad_changes_of_the_fleet_change_nothing(stack, http_of, method, path, body, status):
    """What cannot be done is refused with an error of the usual form, and the fleet stays."""
    async with stack(1) as s:
        answer = await http_of(s, headers=ADMIN).request(method, path, json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (status, status)
        assert await used(http_of(s), 1) == {"e0"}


async def test_clients_cannot_name_an_endpoint(stack, http_of):
    """No header and no field makes the gateway call an address that is not of its fleet."""
    async with stack(1) as s:
        headers = {"x-worker-url": "http://127.0.0.1:9", "x-almanac-endpoint": "http://evil"}
        body = {**CALL, "url": "http://127.0.0.1:9", "api_base": "http://127.0.0.1:9"}
        answer = await http_of(s).post("/v1/completions", json=body, headers=headers)
        assert (answer.status_code, answer.headers["x-almanac-endpoint"]) == (200, "e0")


async def test_all_ways_to_ask_for_health(stack, http_of):
    """Every usual probe path answers; only readiness minds the endpoints."""
    async with stack(1, config={"breaker_pause_s": 60.0}) as s:
        http = http_of(s)
        s.control.endpoint_failed(0, "test", unreachable=True)
        for path in ("/health", "/healthz", "/liveness"):
            assert (await http.get(path)).status_code == 200
        assert (await http.get("/readiness")).status_code == 503


async def raw(s, data):
    """Send bytes and return status and body of the answer."""
    host, port = s.gateway.address.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(data)
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    head, _, body = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"GET /health HTTP/1.1\r\n%sx-a: %s\r\n\r\n" % (CLOSE, b"x" * 9_000), 431),
        (b"GET /%s HTTP/1.1\r\n%s\r\n" % (b"x" * 9_000, CLOSE), 431),
        (b"GET /health HTTP/1.1\r\n%sx-a: %s\r\n\r\n" % (CLOSE, b"x" * 70_000), 431),
        (b"not http at all\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-length: x\r\n\r\n", 400),
        (b"GET /health HTTP/1.1\r\nbad header\r\nauthorization: Bearer hush\r\n\r\n", 400),
    ],
)
async def test_broken_requests_get_the_usual_error(stack, caplog, data, status):
    """Oversized headers are 431, what is no HTTP is 400: OpenAI bodies, and no key in the log."""
    async with stack(1, config={"max_header_bytes": 4096}) as s:
        code, body = await raw(s, data)
    error = json.loads(body)["error"]
    assert (code, error["code"]) == (status, status)
    assert set(error) == {"message", "type", "param", "code"}
    assert "hush" not in caplog.text + str(body)


async def test_the_description_names_every_route(stack, http_of):
    """What is served is described and what is described is served."""
    async with stack(1) as s:
        document = (await http_of(s).get("/openapi.json")).json()
        served = {
            (route.resource.canonical, route.method.lower())
            for route in s.gateway.app().router.routes()
            if route.method != "HEAD"
        }
    described = {
        (path, method)
        for path, item in document["paths"].items()
        for method in item
        if method != "parameters"
    }
    assert {(path.replace("{id:.+}", "{id}"), method) for path, method in served} == described
    assert document == json.loads(json.dumps(openapi(document["info"]["version"])))


@pytest.fixture
def certificate(tmp_path):
    """Return the files of a fresh certificate for loopback, and its key."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = (
        f"openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=localhost"
        f" -addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {cert}"
    )
    try:
        subprocess.run(command.split(), check=True, capture_output=True)  # noqa: S603
    except FileNotFoundError:
        pytest.skip("needs openssl to make a certificate")
    return cert, key


async def test_serving_https(fleet_of, tmp_path, certificate):
    """With certificate and key the gateway speaks TLS and nothing else."""
    cert, key = certificate
    gateway = Gateway(Control(fleet_of(1)), port=0, tls=tls_context(str(cert), str(key)))
    await gateway.start()
    try:
        assert gateway.address.startswith("https://")
        trust = ssl.create_default_context(cafile=str(cert))
        async with httpx.AsyncClient(base_url=gateway.address, verify=trust) as http:
            assert (await http.get("/health")).status_code == 200
        async with httpx.AsyncClient() as http:
            with pytest.raises(httpx.HTTPError):
                await http.get(gateway.address.replace("https", "http") + "/health")
    finally:
        await gateway.aclose()
    with pytest.raises(InvalidInput, match="cannot be used"):
        tls_context(str(key), str(cert))
    with pytest.raises(InvalidInput, match=r"none\.pem"):
        tls_context(str(tmp_path / "none.pem"), str(key))
