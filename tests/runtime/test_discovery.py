"""Endpoints known by their address alone."""

from __future__ import annotations

import pytest

from planner.domain.errors import InvalidInput
from runtime.discovery import ask_fleet
from runtime.mock.server import MockConfig, MockFleet


async def test_endpoints_describe_themselves(fleet_of):
    """Model, KV pool and address come from the endpoints; the rest is usual."""
    fleet = fleet_of(2, kv_blocks=321)
    async with MockFleet(fleet, MockConfig(dilation=50.0), any_port=True) as mock:
        urls = [mock.addresses[0], f"{mock.addresses[1]}/v1"]
        found = await ask_fleet(urls)
    assert [endpoint.url for endpoint in found.endpoints] == list(mock.addresses)
    assert {endpoint.model for endpoint in found.endpoints} == {"m"}
    assert {endpoint.kv_blocks for endpoint in found.endpoints} == {321}
    assert [endpoint.id for endpoint in found.endpoints] == [
        url.removeprefix("http://") for url in mock.addresses
    ]


@pytest.mark.parametrize(
    ("urls", "match"),
    [
        (["localhost"], r"--worker-urls\[0\]: 'localhost' is not an address"),
        (["http://127.0.0.1:9999", "http://a:b"], r"--worker-urls\[1\]"),
        (["http://127.0.0.1:9"], "does not say which model it serves.*start it first"),
    ],
)
async def test_silent_or_odd_addresses_are_input_errors(urls, match):
    """What cannot be asked is told with the address and what to do."""
    with pytest.raises(InvalidInput, match=match):
        await ask_fleet(urls)
