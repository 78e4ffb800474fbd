"""OpenAI bodies and server-sent events."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.wire import DONE, ApiError, SseTap, Usage, read_usage, sse, with_fields


class TestWithFields:
    @pytest.mark.parametrize(
        "body", [b'{"a": 1}', b'{"a": 1}  \n', b"{}", b' {"priority": 3, "a": 1}']
    )
    def test_the_result_is_the_object_with_the_fields(self, body):
        """Fields are added or replaced, and everything else stays."""
        changed = with_fields(body, json.loads(body), {"priority": -5, "x": {"y": None}})
        assert json.loads(changed) == {**json.loads(body), "priority": -5, "x": {"y": None}}

    def test_nothing_to_set_leaves_the_bytes(self):
        """Without fields the very same bytes are returned."""
        body = b'{ "a" : 1 }'
        assert with_fields(body, {"a": 1}, {}) is body

    def test_a_long_body_is_not_written_again(self):
        """New fields are spliced in behind the bytes as they came."""
        body = b'{"messages":  [1,2,   3]}'
        assert with_fields(body, json.loads(body), {"p": 1}).startswith(body[:-1])


class TestUsage:
    def test_chat_and_responses_forms(self):
        """Both spellings of usage are read, cached tokens included."""
        chat = {"prompt_tokens": 9, "completion_tokens": 4,
                "prompt_tokens_details": {"cached_tokens": 8}}  # fmt: skip
        other = {"response": {"usage": {"input_tokens": 9, "output_tokens": 4,
                                        "input_tokens_details": {"cached_tokens": 8}}}}  # fmt: skip
        expected = Usage(prompt_tokens=9, output_tokens=4, cached_tokens=8)
        assert read_usage({"usage": chat}) == expected
        assert read_usage(other) == expected

    @pytest.mark.parametrize("payload", [None, [], {}, {"usage": None}, {"usage": 3}])
    def test_absent_usage_is_none(self, payload):
        """Whatever holds no usage gives None."""
        assert read_usage(payload) is None

    def test_odd_values_count_as_not_said(self):
        """Negative or wrongly typed counts are not believed."""
        usage = read_usage({"usage": {"prompt_tokens": "9", "completion_tokens": -1}})
        assert usage == Usage(prompt_tokens=None, output_tokens=0)


def token(text):
    return sse({"choices": [{"delta": {"content": text}}]})


STREAM = (
    token("a")
    + token('the "usage" of words')
    + sse({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}})
    + DONE
)


class TestSseTap:
    @given(cuts=st.lists(st.integers(0, len(STREAM)), max_size=8))
    def test_any_cutting_gives_the_same_stream(self, cuts):
        """However the bytes arrive, all events pass unchanged and the usage is learned."""
        tap = SseTap()
        edges = [0, *sorted(cuts), len(STREAM)]
        out = b"".join(tap.feed(STREAM[a:b]) for a, b in pairwise(edges))
        assert out + tap.rest() == STREAM
        assert tap.usage == Usage(prompt_tokens=3, output_tokens=2)
        assert (tap.done, tap.failed, tap.chunks) == (True, False, 3)

    def test_usage_nobody_asked_for_is_taken_out(self):
        """The chunk with nothing but usage is dropped on demand, and no other."""
        tap = SseTap(strip_usage=True)
        assert tap.feed(STREAM) == token("a") + token('the "usage" of words') + DONE
        assert tap.usage is not None

    def test_an_error_event_is_noticed(self):
        """An error inside a stream passes and is remembered."""
        tap = SseTap()
        event = sse({"error": {"message": "dead", "code": 500}})
        assert tap.feed(event) == event
        assert tap.failed

    def test_an_unfinished_event_is_held_back(self):
        """Half an event is not passed on until its end comes."""
        tap = SseTap()
        assert tap.feed(token("a")[:-1]) == b""
        assert tap.feed(b"\n") == token("a")


class TestApiError:
    def test_body_is_openai_like(self):
        """The body holds message, type, param and code."""
        assert json.loads(ApiError(404, "no such model", param="model").body) == {
            "error": {
                "message": "no such model",
                "type": "NotFoundError",
                "param": "model",
                "code": 404,
            }
        }
