"""One mock endpoint, and clients for it."""

from __future__ import annotations

import openai
import pytest

from runtime.mock.server import MockConfig, MockFleet


def user(text):
    return [{"role": "user", "content": text}]


def xargs(tokens, **more):
    return {"vllm_xargs": {"mock_output_tokens": tokens, **more}}


@pytest.fixture
def mock_of(fleet_of):
    """Return a factory of mock fleets on free ports: ``async with mock_of(count=2) as mock``."""

    def make(count=1, *, faults=None, fleet=None, changes=None, **config):
        return MockFleet(
            fleet or fleet_of(count, **(changes or {})),
            MockConfig(**{"dilation": 100.0, "seed": 3, **config}),
            faults=faults,
            any_port=True,
        )

    return make


@pytest.fixture
def client_of():
    """Return a factory of the real client, for an endpoint of a running mock fleet."""

    def make(mock, index=0, **options):
        values = {"api_key": "none", "max_retries": 0, **options}
        return openai.AsyncOpenAI(base_url=f"{mock.addresses[index]}/v1", **values)

    return make
