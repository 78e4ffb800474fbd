"""The client side on real sockets, against servers that misbehave."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager

import pytest
from aiohttp import TCPConnector

from runtime.endpoints import EndpointLink
from runtime.links import EndpointBroken, EndpointUnreachable
from runtime.transport import bind_problem, open_session

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


@asynccontextmanager
async def raw_server(answer, *, linger=None):
    """Serve fixed bytes to each connection, then wait for ``linger``, then close it."""
    closed = asyncio.Event()

    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        if linger is not None:
            await reader.read()  # until the other side closes
            closed.set()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", closed


@pytest.fixture
def link_to(fleet_of, urls_of):
    @asynccontextmanager
    async def connect(url, read_timeout_s=5.0, connect_timeout_s=1.0):
        session = open_session(connect_timeout_s=connect_timeout_s, read_timeout_s=read_timeout_s)
        async with session:
            yield EndpointLink(urls_of(fleet_of(1), [url]).endpoints[0], session)

    return connect


async def read_all(link):
    async with await link.send("/v1/x", b"{}", {}) as answer:
        return b"".join([data async for data in answer.chunks()])


async def test_bytes_come_through_and_own_headers_stay_behind(link_to):
    """Chunks arrive as sent; headers of the connection itself are not passed on."""
    body = HEAD.replace(b"\r\n\r\n", b"\r\nServer: x\r\nX-Y: z\r\n\r\n") + b"3\r\nabc\r\n0\r\n\r\n"
    async with (
        raw_server(body) as (url, _),
        link_to(url) as link,
        await link.send("/v1/x", b"{}", {}) as answer,
    ):
        assert answer.status == 200
        assert set(answer.headers) == {"Content-Type", "X-Y"}
        assert [data async for data in answer.chunks()] == [b"abc"]


async def test_nobody_listening_is_unreachable(link_to):
    """A refused connect is told apart from a broken answer."""
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        async with link_to(url) as link:
            with pytest.raises(EndpointUnreachable):
                await link.send("/v1/x", b"{}", {})
            assert not await link.healthy()


@pytest.mark.parametrize(
    "answer", [b"", b"garbage\r\n\r\n", HEAD + b"3\r\nab", HEAD + b"3\r\nabc\r\n"]
)
async def test_a_connection_that_ends_early_is_broken(link_to, answer):
    """An end before, or in the middle of, the answer is a broken answer."""
    async with raw_server(answer) as (url, _), link_to(url) as link:
        with pytest.raises(EndpointBroken):
            await read_all(link)


@pytest.mark.parametrize("answer", [b"", HEAD, HEAD + b"3\r\nabc\r\n"])
async def test_silence_is_broken(link_to, answer):
    """An endpoint that falls silent is given up after the read timeout."""
    async with (
        raw_server(answer, linger=True) as (url, closed),
        link_to(url, read_timeout_s=0.02) as link,
    ):
        with pytest.raises(EndpointBroken):
            await read_all(link)
        async with asyncio.timeout(5):
            await closed.wait()


async def test_leaving_an_answer_closes_its_connection(link_to):
    """An answer that is not read to its end closes the connection, so the engine can abort."""
    async with (
        raw_server(HEAD + b"3\r\nabc\r\n", linger=True) as (url, closed),
        link_to(url) as link,
    ):
        async with await link.send("/v1/x", b"{}", {}) as answer:
            await anext(answer.chunks())
        async with asyncio.timeout(5):
            await closed.wait()


def test_bind_problems_are_told_in_few_words():
    """The reason is the system's, not the library's sentence around it."""
    assert bind_problem(OSError(98, "error while attempting to bind")) == "address already in use"
    assert bind_problem(socket.gaierror(-2, "Name or service not known")).startswith("Name")


async def test_a_connect_that_never_comes_about_is_given_up(link_to, monkeypatch):
    """A host that answers no connect costs the limit on connects, not the one on answers."""

    async def never(*_details):
        await asyncio.get_running_loop().create_future()

    monkeypatch.setattr(TCPConnector, "_create_connection", never)
    async with link_to("http://127.0.0.1:9", connect_timeout_s=0.01) as link:
        with pytest.raises(EndpointBroken, match="ConnectionTimeoutError"):
            await link.send("/v1/x", b"{}", {})
