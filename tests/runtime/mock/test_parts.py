"""Text, protocol and pacing of the mock endpoint."""

from __future__ import annotations

import asyncio
import json

import pytest

from planner.domain.latency import LatencyRow
from planner.sim.engine import Engine, EngineConfig, EngineRequest
from planner.sim.steptime import RowStepTime
from runtime.clock import Clock
from runtime.mock.pacing import EngineDead, Lateness, PacedEngine
from runtime.mock.protocol import Limits, Writer, read_request, usage_json
from runtime.mock.text import block_chain, chat_tokens, prompt_tokens, reply_words
from runtime.wire import ApiError

LIMITS = Limits(model="m", max_model_len=100, block_tokens=16)


def user(text):
    return {"role": "user", "content": text}


def read(chat=True, **fields):
    payload = {"model": "m", "messages": [user("a b c")], **fields}
    return read_request(json.dumps(payload).encode(), LIMITS, chat=chat, seed=1)


class TestText:
    def test_a_message_costs_its_words_and_four(self):
        """Each message costs four tokens beside its words, and the answer's beginning three."""
        assert len(chat_tokens([user("one two three")])) == 3 + 4 + 3

    def test_an_answer_put_back_continues_its_prompt(self):
        """The next turn's prompt begins with the prompt and the answer of the turn before."""
        messages = [user("word " * 40)]
        reply = reply_words(7, 30)
        whole = chat_tokens(messages) + reply
        later = chat_tokens([*messages, {"role": "assistant", "content": " ".join(reply)}])
        assert later[: len(whole)] == whole
        assert block_chain(later, 16)[: len(whole) // 16] == block_chain(whole, 16)

    def test_salt_and_text_change_the_chain(self):
        """Other text or another salt share no block from there on."""
        tokens = prompt_tokens("w " * 48)
        changed = [*tokens[:20], "other", *tokens[21:]]
        plain = block_chain(tokens, 16)
        assert block_chain(changed, 16)[0] == plain[0]
        assert block_chain(changed, 16)[1] != plain[1]
        assert not set(block_chain(tokens, 16, "salt")) & set(plain)

    def test_replies_are_deterministic(self):
        """The same seed gives the same words, begun as asked and exactly as long as asked."""
        words = reply_words(3, 10, ["quick", "yes"])
        assert words == reply_words(3, 10, ["quick", "yes"])
        assert words[:2] == ["quick", "yes"]
        assert len(words) == 10
        assert reply_words(3, 1, ["quick", "yes"]) == ["quick"]


class TestReadRequest:
    def test_an_answer_of_given_length_stops_by_itself(self):
        """`mock_output_tokens` fixes the length and `mock_reply` the first words."""
        xargs = {"mock_output_tokens": 12, "mock_reply": "deep yes"}
        request = read(vllm_xargs=xargs)
        assert (len(request.words), request.stops_at_eos) == (12, True)
        assert request.words[:2] == ("deep", "yes")
        assert len(request.block_hashes) == (10 + 12) // 16

    @pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
    def test_limits_cut_the_answer(self, field):
        """Both names of the limit cut the answer, which then ends by length."""
        request = read(**{field: 5}, vllm_xargs={"mock_output_tokens": 12})
        assert (len(request.words), request.stops_at_eos) == (5, False)

    def test_a_limit_above_the_context_is_lowered(self):
        """A limit that exceeds what is left of the context is clamped, not refused."""
        request = read(max_tokens=10_000, vllm_xargs={"mock_output_tokens": 5000})
        assert len(request.words) == 100 - request.prompt_tokens

    def test_ignore_eos_goes_to_the_limit(self):
        """With `ignore_eos` the answer is as long as the limit allows."""
        request = read(max_tokens=50, ignore_eos=True, vllm_xargs={"mock_output_tokens": 3})
        assert (len(request.words), request.stops_at_eos) == (50, False)

    def test_min_tokens_is_kept(self):
        """An answer is not shorter than `min_tokens`."""
        assert len(read(min_tokens=20, vllm_xargs={"mock_output_tokens": 3}).words) == 20

    def test_lengths_nobody_set_depend_on_the_prompt_alone(self):
        """The same prompt gets the same answer; another prompt another one."""
        assert read() == read()
        assert read().words != read(messages=[user("other words")]).words

    def test_completions_have_vllm_s_default_limit(self):
        """A completion without a limit is at most 16 tokens long; token ids are taken."""
        for prompt in ("a b", ["a b"], [7, 8]):
            request = read(chat=False, prompt=prompt, vllm_xargs={"mock_output_tokens": 40})
            assert (request.prompt_tokens, len(request.words)) == (2, 16)

    def test_unknown_fields_are_ignored(self):
        """A field the mock does not know is never refused, as in vLLM."""
        assert read(anything={"x": 1}, kv_transfer_params=None, temperature=0.3)

    @pytest.mark.parametrize(
        ("fields", "status"),
        [
            ({"model": "nope"}, 404),
            ({"messages": [user("w " * 200)]}, 400),
            ({"messages": None}, 400),
            ({"messages": "text"}, 400),
            ({"max_tokens": 0}, 400),
            ({"max_tokens": "many"}, 400),
            ({"cache_salt": ""}, 400),
            ({"n": 2}, 400),
            ({"priority": "high"}, 400),
            ({"vllm_xargs": {"mock_output_tokens": 0}}, 400),
        ],
    )
    def test_refusals(self, fields, status):
        """What vLLM would refuse, or the mock cannot do, gets a 4xx and no 500."""
        with pytest.raises(ApiError) as caught:
            read(**fields)
        assert caught.value.status == status

    @pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff\xfe", b'{"model": "m"}'])
    def test_broken_bodies(self, body):
        """Bodies that are no request are validation errors."""
        with pytest.raises(ApiError) as caught:
            read_request(body, LIMITS, chat=True, seed=0)
        assert (caught.value.status, caught.value.kind) == (400, "Bad Request")


class TestWriter:
    def test_chunks_follow_vllm(self):
        """Chunks carry the nulls that vLLM sends, and their texts add up to the answer."""
        request = read(vllm_xargs={"mock_output_tokens": 3})
        writer = Writer(request, "id")
        role, one, last, usage = (
            json.loads(event[6:])
            for event in (
                writer.first(),
                writer.chunk(0, 1, None, None),
                writer.chunk(1, 3, "stop", None),
                writer.usage(usage_json(request, 3, 0)),
            )
        )
        assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert role["id"] == "chatcmpl-id"
        assert role["prompt_token_ids"] is None
        assert one["choices"][0]["finish_reason"] is None
        assert "stop_reason" not in one["choices"][0]
        assert last["choices"][0]["finish_reason"] == "stop"
        assert last["choices"][0]["stop_reason"] is None
        texts = [chunk["choices"][0]["delta"]["content"] for chunk in (one, last)]
        assert "".join(texts) == " ".join(request.words)
        assert usage["choices"] == []
        assert usage["usage"]["total_tokens"] == request.prompt_tokens + 3

    def test_details_are_null_when_switched_off(self):
        """Cached tokens are only told when the server is asked to."""
        assert usage_json(read(), 1, None)["prompt_tokens_details"] is None


class TestLateness:
    def test_quantiles_are_upper_bounds_within_a_step(self):
        """A quantile is at least the true value and at most 15 % above."""
        lateness = Lateness()
        assert lateness.quantile(0.5) == 0.0
        for value in range(1, 101):
            lateness.add(value * 1e-3, 1)
        assert 0.050 <= lateness.quantile(0.5) <= 0.050 * 1.15
        assert 0.099 <= lateness.quantile(0.99) <= 0.099 * 1.15


ROW = LatencyRow(
    prefill_base_ms=10.0,
    prefill_us_per_token=0.0,
    prefill_ns_per_token_sq=0.0,
    decode_base_ms=10.0,
    decode_us_per_call=0.0,
    decode_ns_per_kv_token=0.0,
)


def paced(events=None, dilation=100.0):
    engine = Engine(EngineConfig(kv_blocks=100, max_num_seqs=4), RowStepTime(ROW))
    seen = [] if events is None else events
    return PacedEngine(
        engine, Clock(dilation), lambda answer, n, gap_s: seen.append((answer, n, gap_s))
    )


def call(name="r", output=5, arrival_s=0.0):
    return EngineRequest(
        request_id=name, prompt_tokens=20, output_tokens=output, arrival_s=arrival_s
    )


class TestPacedEngine:
    async def test_tokens_come_in_order_and_by_interval(self):
        """The reader is woken for the first token, then by interval, then for the last."""
        one = paced()
        task = asyncio.create_task(one.run())
        answer = one.submit(call(output=8), 3)
        seen = []
        while answer.finish_reason is None:
            await answer.more()
            seen.append(answer.produced)
        task.cancel()
        assert seen[0] == 1
        assert seen[-1] == 8
        assert len(seen) <= 4
        assert answer.finish_reason == "length"
        assert one.live == 0

    async def test_steps_follow_each_other_without_a_gap(self):
        """Engine times are the model's own, however late the machine wakes up."""
        one = paced()
        task = asyncio.create_task(one.run())
        for name in ("a", "b"):  # the second one comes after a pause
            request = call(name, output=10)
            answer = one.submit(request, 10)
            while answer.finish_reason is None:
                await answer.more()
            assert request.finish_s - request.first_scheduled_s == pytest.approx(0.1)
        task.cancel()

    async def test_dropping_an_answer_frees_the_engine(self):
        """An answer given back before its end leaves no trace in the engine."""
        one = paced()
        task = asyncio.create_task(one.run())
        answer = one.submit(call(output=1000), 1)
        await answer.more()
        one.drop(answer)
        one.drop(answer)
        assert (one.live, one.engine.num_running, one.engine.kv_usage) == (0, 0, 0.0)
        task.cancel()

    async def test_a_dead_engine_fails_its_readers(self, monkeypatch):
        """When the engine breaks, waiting answers fail and new ones are refused."""
        one = paced()
        answer = one.submit(call(), 1)

        def explode(engine, now_s):
            raise RuntimeError("broken")

        monkeypatch.setattr(Engine, "step", explode)
        with pytest.raises(RuntimeError, match="broken"):
            await one.run()
        with pytest.raises(EngineDead):
            await answer.more()
        with pytest.raises(EngineDead):
            one.submit(call("new"), 1)
