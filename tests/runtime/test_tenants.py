"""Tenants: told apart by their keys alone, and kept apart in everything."""

from __future__ import annotations

import json
import logging

import httpx
import pytest
from multidict import CIMultiDict

from planner.domain.trace import CallRecord, RunRecord, load_trace
from runtime.diagnostics import diagnostics, metrics_text
from runtime.keys import KeyedTenancy, bearer, read_tenants, same_key
from runtime.limits import ANYONE
from runtime.wire import ApiError

KEYS = {"A_KEY": "key-of-a", "B_KEY": "key-of-b"}


def tenancy():
    raw = [
        {"name": "a", "key_env": "A_KEY", "weight": 2, "priority": 1},
        {"name": "b", "key_env": "B_KEY"},
    ]
    return KeyedTenancy(read_tenants(raw, "tenants", KEYS))


def key(name):
    return {"authorization": f"Bearer {KEYS[name]}"}


def chat(text="secret prompt text", **fields):
    body = {"model": "m", "messages": [{"role": "user", "content": text}], "max_tokens": 3}
    return {**body, **fields}


class TestTenancy:
    def test_the_key_says_who_it_is(self):
        """Each key has its tenant, in either header, and no other header matters."""
        keyed = tenancy()
        assert keyed.of(CIMultiDict(key("A_KEY"))).name == "a"
        assert keyed.of(CIMultiDict({"X-Api-Key": "key-of-b"})).name == "b"
        assert keyed.of(CIMultiDict({**key("A_KEY"), "x-tenant-id": "b"})).name == "a"

    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"authorization": "Bearer "},
            {"authorization": "Bearer key-of-"},
            {"authorization": "key-of-a"},
            {"authorization": "Basic key-of-a"},
            {"x-api-key": "ключ"},
        ],
    )
    def test_without_a_key_nobody_gets_in(self, headers):
        """Missing and wrong keys are refused with 401 and nothing about the right ones."""
        with pytest.raises(ApiError) as refused:
            tenancy().of(CIMultiDict(headers))
        assert refused.value.status == 401
        assert "key-of" not in refused.value.message

    def test_without_tenants_everybody_is_one(self):
        """A gateway without tenants asks for no key."""
        assert KeyedTenancy().of(CIMultiDict()) is ANYONE
        assert not KeyedTenancy().keyed

    def test_salts_differ_and_are_stable(self):
        """Each tenant has a salt of its own, which the client's own one goes into."""
        keyed, again = tenancy(), tenancy()
        a, b = (keyed.of(CIMultiDict(key(name))) for name in KEYS)
        assert keyed.salt(a) != keyed.salt(b)
        assert keyed.salt(a, "x") != keyed.salt(a, "y")
        assert keyed.salt(a) == again.salt(again.of(CIMultiDict(key("A_KEY"))))
        assert keyed.salt(ANYONE) is None

    def test_keys_are_not_kept(self):
        """Neither key nor digest shows when a tenancy is printed."""
        assert "key-of" not in repr(tenancy().__class__) + repr(
            read_tenants([{"name": "a", "key_env": "A_KEY"}], "tenants", KEYS)
        )

    def test_keys_are_compared_whole(self):
        """Equal keys are the same, prefixes of them are not."""
        assert same_key("abc", "abc")
        assert not same_key("ab", "abc")
        assert bearer({"authorization": "bearer abc"}) == "abc"


async def test_requests_need_a_tenant_s_key(stack):
    """Inference, events and ends of sessions are refused without a key; health is not."""
    async with (
        stack(1, tenancy=tenancy()) as s,
        httpx.AsyncClient(base_url=s.gateway.address) as http,
    ):
        for path in ("/v1/chat/completions", "/almanac/v1/events", "/finish_session"):
            answer = await http.post(path, json=chat())
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, 401)
        assert (await http.get("/health")).status_code == 200
        assert (
            await http.post("/v1/chat/completions", json=chat(), headers=key("A_KEY"))
        ).status_code == 200


async def test_tenants_do_not_share_names_or_caches(stack):
    """For another tenant the same session is another run, the same prompt another prefix."""
    bodies = []
    async with (
        stack(1, policy="least_expected_finish", tenancy=tenancy()) as s,
        httpx.AsyncClient(base_url=s.gateway.address) as http,
    ):
        link = s.gateway.forwarder._links[0]
        send = link.send

        class Spy:
            def __getattr__(self, name):
                return getattr(link, name)

            async def send(self, path, body, headers):
                bodies.append((json.loads(body), dict(headers)))
                return await send(path, body, headers)

        s.gateway.forwarder._links[0] = Spy()
        text = "word " * 200
        for name in ("A_KEY", "B_KEY", "A_KEY"):
            answer = await http.post(
                "/v1/chat/completions",
                json=chat(text),
                headers={**key(name), "x-session-id": "s"},
            )
            assert answer.status_code == 200
        assert {run.run_id for run in s.control.runs.active()} == {"a/s", "b/s"}
        salts = [body["cache_salt"] for body, _ in bodies]
        assert salts[0] == salts[2] != salts[1]
        # One tenant cannot end the other's session.
        ended = await http.post("/finish_session", json={"session_id": "s"}, headers=key("B_KEY"))
        assert ended.json() == {"ended": 1}
        assert "a/s" in {run.run_id for run in s.control.runs.active()}
        for _, headers in bodies:
            assert not {name.lower() for name in headers} & {"authorization", "x-api-key"}


async def test_prefixes_are_shared_where_that_is_allowed(stack):
    """With `share_prefixes` nothing is added to the body."""
    async with (
        stack(1, tenancy=tenancy(), config={"share_prefixes": True}) as s,
        httpx.AsyncClient(base_url=s.gateway.address) as http,
    ):
        for name in KEYS:
            await http.post("/v1/chat/completions", json=chat("w " * 300), headers=key(name))
        state = s.control.router.view.states[0]
        assert state.prefix.held_tokens < 400


async def test_no_prompt_and_no_key_is_ever_written(stack, tmp_path, caplog):
    """Whatever goes right or wrong, logs, traces, metrics and diagnostics hold no text, no key."""
    with caplog.at_level(logging.DEBUG):
        async with (
            stack(2, tenancy=tenancy()) as s,
            httpx.AsyncClient(base_url=s.gateway.address) as http,
        ):
            trace = tmp_path / "t.jsonl"
            s.control.set_trace(trace)
            good = {**key("A_KEY"), "x-almanac-priority": "secret prompt text"}
            requests = [
                (json.dumps(chat()), good),
                (json.dumps(chat(stream=True)), good),
                (json.dumps(chat())[:-1], good),
                (json.dumps(chat(model="secret prompt text")), good),
                (json.dumps(chat()), {"authorization": "Bearer key-of-nobody"}),
                (json.dumps(chat("secret prompt text " * 9000)), good),
            ]
            for body, headers in requests:
                await http.post("/v1/chat/completions", content=body, headers=headers)
            await s.mock.endpoints[0].go_down(abort=True)
            for _ in range(4):
                await http.post("/v1/chat/completions", json=chat(), headers=good)
            views = metrics_text(s.control) + json.dumps(diagnostics(s.control))
        written = trace.read_text() + views + caplog.text
        for record in caplog.records:
            written += repr(record.__dict__)
    assert "key-of" not in written
    kinds = {type(one) for one in load_trace(trace)}
    assert {CallRecord, RunRecord} <= kinds
    assert "secret prompt" not in trace.read_text() + views
    own = [r for r in caplog.records if r.name.startswith(("runtime", "planner"))]
    assert "secret prompt" not in repr([record.__dict__ for record in own])
