"""Text, protocol and pacing of the mock endpoint."""

from __future__ import annotations

import asyncio
import json

import pytest

from planner.domain.latency import LatencyRow
from planner.sim.engine import Engine, EngineConfig, EngineRequest
from planner.sim.steptime import RowStepTime
from runtime.clock import Clock
from runtime.mock.answers import Writer, usage_json
from runtime.mock.pacing import EngineDead, Lateness, PacedEngine
from runtime.mock.protocol import Limits, read_request
from runtime.mock.text import Vocabulary, block_chain, chat_tokens, prompt_tokens, reply_words
from runtime.wire import ApiError

LIMITS = Limits(models=("m", "adapter"), max_model_len=100, block_tokens=16)


def user(text):
    return {"role": "user", "content": text}


def read(chat=True, **fields):
    payload = {"model": "m", "messages": [user("a b c")], **fields}
    return read_request(
        json.dumps(payload).encode(), LIMITS, chat=chat, seed=1, vocabulary=Vocabulary()
    )


def sample(chat=True, **fields):
    """Return the only answer of a request."""
    (one,) = read(chat=chat, **fields).samples
    return one


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


class TestVocabulary:
    def test_ids_and_words_agree(self):
        """Words come back from their ids; an id nobody handed out is a word of its own."""
        vocabulary = Vocabulary()
        words = ["the", "never-heard-of", "the"]
        ids = vocabulary.ids(words)
        assert ids[0] == ids[2] != ids[1]
        assert vocabulary.words(ids) == words
        assert vocabulary.words([10**9, -1]) == ["<1000000000>", "<-1>"]

    def test_it_does_not_grow_without_end(self):
        """When it is full, new words share one id."""
        vocabulary = Vocabulary(most=200)
        ids = vocabulary.ids(f"word{number}" for number in range(500))
        assert set(ids[-300:]) == {0}


class TestReadRequest:
    def test_an_answer_of_given_length_stops_by_itself(self):
        """`mock_output_tokens` fixes the length and `mock_reply` the first words."""
        one = sample(vllm_xargs={"mock_output_tokens": 12, "mock_reply": "deep yes"})
        assert (len(one.tokens), one.finish_reason) == (12, "stop")
        assert one.tokens[:2] == ("deep", "yes")
        assert "".join(one.pieces) == " ".join(one.tokens)
        assert len(one.block_hashes) == (10 + 12) // 16

    @pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
    def test_limits_cut_the_answer(self, field):
        """Both names of the limit cut the answer, which then ends by length."""
        one = sample(**{field: 5}, vllm_xargs={"mock_output_tokens": 12})
        assert (len(one.tokens), one.finish_reason) == (5, "length")

    def test_a_limit_above_the_context_is_lowered(self):
        """A limit that exceeds what is left of the context is clamped, not refused."""
        one = sample(max_tokens=10_000, vllm_xargs={"mock_output_tokens": 5000})
        assert len(one.tokens) == 100 - len(one.prompt)

    def test_ignore_eos_goes_to_the_limit(self):
        """With `ignore_eos` the answer is as long as the limit allows."""
        one = sample(max_tokens=50, ignore_eos=True, vllm_xargs={"mock_output_tokens": 3})
        assert (len(one.tokens), one.finish_reason) == (50, "length")

    def test_min_tokens_is_kept(self):
        """An answer is not shorter than `min_tokens`."""
        assert len(sample(min_tokens=20, vllm_xargs={"mock_output_tokens": 3}).tokens) == 20

    def test_lengths_nobody_set_depend_on_the_prompt_alone(self):
        """The same prompt gets the same answer; another prompt another one."""
        assert read() == read()
        assert sample().tokens != sample(messages=[user("other words")]).tokens

    def test_completions_have_vllm_s_default_limit(self):
        """A completion without a limit is at most 16 tokens long; token ids are taken."""
        for prompt in ("a b", ["a b"], [7, 8], [[7, 8]]):
            one = sample(chat=False, prompt=prompt, vllm_xargs={"mock_output_tokens": 40})
            assert (len(one.prompt), len(one.tokens)) == (2, 16)

    def test_each_prompt_gets_n_answers(self):
        """Choices are counted prompt by prompt, prompts once; answers to one prompt differ."""
        request = read(chat=False, prompt=["a b", "c d e"], n=2, max_tokens=9)
        assert [len(one.prompt) for one in request.samples] == [2, 2, 3, 3]
        assert request.prompt_tokens == 5
        assert request.samples[0].tokens != request.samples[1].tokens

    def test_a_stop_string_cuts_text_and_tokens(self):
        """The text ends before the stop string, the tokens with the one that completes it."""
        xargs = {"mock_output_tokens": 9, "mock_reply": "one two three"}
        for extra, text in (({}, "one t"), ({"include_stop_str_in_output": True}, "one two th")):
            one = sample(stop=["zzz", "wo th"], vllm_xargs=xargs, **extra)
            assert one.tokens == ("one", "two", "three")
            assert "".join(one.pieces) == text
            assert (one.finish_reason, one.stop_reason) == ("stop", "wo th")

    def test_a_stop_token_ends_the_answer(self):
        """A stop token id ends the answer and is its reason; before `min_tokens` it is no stop."""
        ids = Vocabulary().ids(["plan"])
        fields = {"stop_token_ids": ids, "vllm_xargs": {"mock_reply": "a plan b plan c"}}
        one = sample(**fields)
        assert (one.tokens, one.stop_reason) == (("a", "plan"), ids[0])
        assert "".join(one.pieces) == "a"
        assert sample(**fields, min_tokens=3).tokens == ("a", "plan", "b", "plan")

    def test_tool_calls_end_the_answer(self):
        """Asked-for tool calls come last, as a list or as JSON text; their tokens have no text."""
        calls = [{"name": "look", "arguments": {"at": "it  now"}}]
        for directive in (calls, calls[0], json.dumps(calls)):
            one = sample(vllm_xargs={"mock_tool_calls": directive, "mock_reply": "well"})
            assert one.finish_reason == "tool_calls"
            assert one.tokens == ("well", "<|call|>", "look", '{"at":', '"it', 'now"}')
            assert "".join(one.pieces) == "well"
        cut = sample(max_tokens=2, vllm_xargs={"mock_tool_calls": calls})
        assert (len(cut.tokens), cut.finish_reason) == (2, "length")

    def test_the_body_s_priority_goes_before_the_header_s(self):
        """The header's priority holds where the body has none."""
        body = {"model": "m", "messages": [user("a")]}
        for own, expected in (({}, 7), ({"priority": -2}, -2)):
            request = read_request(
                json.dumps(body | own).encode(), LIMITS, chat=True, seed=0,
                vocabulary=Vocabulary(), priority=7,
            )  # fmt: skip
            assert request.priority == expected

    def test_adapters_are_models(self):
        """A request may name an adapter; without a name it means the model."""
        assert read(model="adapter").model == "adapter"
        assert read(model=None).model == "m"

    def test_unknown_fields_are_ignored(self):
        """A field the mock does not know is never refused, as in vLLM."""
        assert read(anything={"x": 1}, kv_transfer_params=None, temperature=0.3)

    @pytest.mark.parametrize(
        ("fields", "status", "kind", "param"),
        [
            ({"model": "nope"}, 404, "NotFoundError", "model"),
            ({"model": 7}, 400, "Bad Request", None),
            ({"messages": [user("w " * 200)]}, 400, "BadRequestError", "input_tokens"),
            ({"messages": None}, 400, "Bad Request", None),
            ({"messages": "text"}, 400, "Bad Request", None),
            ({"messages": []}, 400, "Bad Request", None),
            ({"messages": [{"content": "a"}]}, 400, "Bad Request", None),
            ({"max_tokens": 0}, 400, "BadRequestError", "max_tokens"),
            ({"max_tokens": "many"}, 400, "Bad Request", None),
            ({"max_tokens": 10**30}, 400, "Bad Request", None),
            ({"max_tokens": 3, "min_tokens": 4}, 400, "BadRequestError", "min_tokens"),
            ({"cache_salt": ""}, 400, "Bad Request", None),
            ({"cache_salt": "a/b"}, 400, "Bad Request", None),
            ({"cache_salt": "x" * 129}, 400, "Bad Request", None),
            ({"n": 0}, 400, "BadRequestError", "n"),
            ({"n": 10_000}, 400, "Bad Request", None),
            ({"priority": "high"}, 400, "Bad Request", None),
            ({"temperature": -1}, 400, "BadRequestError", "temperature"),
            ({"temperature": float("nan")}, 400, "BadRequestError", "temperature"),
            ({"top_p": 0}, 400, "BadRequestError", "top_p"),
            ({"stream": "yes"}, 400, "Bad Request", None),
            ({"stream_options": {"include_usage": True}}, 400, "Bad Request", None),
            ({"stop": [""]}, 400, "BadRequestError", "stop"),
            ({"stop": 3}, 400, "Bad Request", None),
            ({"stop_token_ids": ["a"]}, 400, "Bad Request", None),
            ({"top_logprobs": 2}, 400, "BadRequestError", "top_logprobs"),
            ({"logprobs": True, "top_logprobs": 99}, 400, "BadRequestError", "logprobs"),
            ({"tools": "hammer"}, 400, "Bad Request", None),
            ({"tools": [{"function": {}}], "tool_choice": "perhaps"}, 400, "Bad Request", None),
            ({"response_format": {"type": "poem"}}, 400, "Bad Request", None),
            ({"kv_transfer_params": 3}, 400, "Bad Request", None),
            ({"vllm_xargs": []}, 400, "Bad Request", None),
            ({"vllm_xargs": {"mock_output_tokens": 0}}, 400, "Bad Request", None),
            ({"vllm_xargs": {"mock_output_tokens": float("inf")}}, 400, "Bad Request", None),
            ({"vllm_xargs": {"mock_tool_calls": 5}}, 400, "Bad Request", None),
            ({"vllm_xargs": {"mock_tool_calls": "["}}, 400, "Bad Request", None),
        ],
    )
    def test_refusals(self, fields, status, kind, param):
        """What vLLM would refuse gets its status, type and parameter, and no 500."""
        with pytest.raises(ApiError) as caught:
            read(**fields)
        error = json.loads(caught.value.body)["error"]
        assert (error["code"], error["type"], error["param"]) == (status, kind, param)
        assert error["message"]

    @pytest.mark.parametrize(
        ("prompt", "param"),
        [(None, None), (3, None), ([], "prompt"), ([[]], "prompt"), ([-1], "prompt"),
         ([["a"]], None), ([True], None), ({"a": 1}, None)],
    )  # fmt: skip
    def test_bad_prompts(self, prompt, param):
        """A prompt that is neither text nor token ids, or empty, is refused."""
        with pytest.raises(ApiError) as caught:
            read(chat=False, prompt=prompt)
        assert (caught.value.status, caught.value.param) == (400, param)

    @pytest.mark.parametrize(
        "body", [b"", b"{", b"[]", b"\xff\xfe", b'{"model": "m"}', b"[" * 100_000]
    )
    def test_broken_bodies(self, body):
        """Bodies that are no request are validation errors."""
        with pytest.raises(ApiError) as caught:
            read_request(body, LIMITS, chat=True, seed=0, vocabulary=Vocabulary())
        assert (caught.value.status, caught.value.kind) == (400, "Bad Request")


def events(*parts):
    """Return the payloads of server-sent events."""
    lines = b"".join(parts).decode().split("\n\n")
    return [json.loads(line.removeprefix("data: ")) for line in lines if line]


class TestWriter:
    def test_chunks_follow_vllm(self):
        """Chunks carry exactly the nulls that vLLM sends, and their texts add up."""
        request = read(vllm_xargs={"mock_output_tokens": 3})
        writer = Writer(request, "id", Vocabulary())
        role, one, last, usage = events(
            writer.first(),
            writer.chunk(0, 0, 1),
            writer.chunk(0, 1, 3, ended=True),
            writer.usage(usage_json(request, 3, 0)),
        )
        head = {"id": "chatcmpl-id", "object": "chat.completion.chunk", "created": role["created"],
                "model": "m"}  # fmt: skip
        words = request.samples[0].tokens
        delta = {"role": "assistant", "content": ""}
        assert role == head | {
            "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}],
            "prompt_token_ids": None,
            "prompt_text": None,
        }
        assert one == head | {
            "choices": [
                {"index": 0, "delta": {"content": words[0]}, "logprobs": None,
                 "finish_reason": None, "token_ids": None}
            ],
            "kv_transfer_params": None,
        }  # fmt: skip
        assert last["choices"] == [
            {"index": 0, "delta": {"content": f" {words[1]} {words[2]}"}, "logprobs": None,
             "finish_reason": "stop", "stop_reason": None, "token_ids": None}
        ]  # fmt: skip
        assert usage == head | {
            "choices": [],
            "usage": {"prompt_tokens": 10, "total_tokens": 13, "completion_tokens": 3,
                      "prompt_tokens_details": {"cached_tokens": 0}},
        }  # fmt: skip

    def test_completions_have_their_own_chunks(self):
        """A completion has no opening chunk, another object, and `text` for `delta`."""
        request = read(chat=False, prompt="a", vllm_xargs={"mock_output_tokens": 2})
        writer = Writer(request, "id", Vocabulary())
        assert writer.first() == b""
        (one,) = events(writer.chunk(0, 0, 2, ended=True, usage=usage_json(request, 2, None)))
        assert (one["id"], one["object"]) == ("cmpl-id", "text_completion")
        assert one["choices"][0]["text"] == " ".join(request.samples[0].tokens)
        assert one["usage"] == {"prompt_tokens": 1, "total_tokens": 3, "completion_tokens": 2}

    def test_details_are_null_when_switched_off(self):
        """Cached tokens are only told when the server is asked to: null in a whole answer."""
        request = read()
        whole = json.loads(Writer(request, "id", Vocabulary()).whole(usage_json(request, 1, None)))
        assert whole["usage"]["prompt_tokens_details"] is None

    @pytest.mark.parametrize("stride", [1, 2, 5, 100])
    def test_tool_calls_are_streamed_as_they_are_told_whole(self, stride):
        """The deltas of tool calls add up to the calls of the whole answer, spaces and all."""
        calls = [{"name": "look", "arguments": '{"at":  "a  b"}'}, {"name": "wait"}]
        request = read(vllm_xargs={"mock_tool_calls": calls, "mock_output_tokens": 12})
        writer = Writer(request, "id", Vocabulary())
        message = json.loads(writer.whole(usage_json(request, 12, None)))["choices"][0]["message"]
        built, text = {}, ""
        for start in range(0, 12, stride):
            (event,) = events(writer.chunk(0, start, min(start + stride, 12)))
            delta = event["choices"][0]["delta"]
            text += delta.get("content") or ""
            for part in delta.get("tool_calls", ()):
                call = built.setdefault(part["index"], {"function": {"arguments": ""}})
                call |= {key: part[key] for key in ("id", "type") if key in part}
                call["function"]["name"] = part["function"].get("name") or call["function"]["name"]
                call["function"]["arguments"] += part["function"]["arguments"]
        assert list(built.values()) == message["tool_calls"]
        assert [call["function"] for call in message["tool_calls"]] == [
            {"name": "look", "arguments": '{"at":  "a  b"}'},
            {"name": "wait", "arguments": "{}"},
        ]
        assert text == message["content"]

    @pytest.mark.parametrize("chat", [True, False])
    def test_log_probabilities_are_well_formed(self, chat):
        """Each token has a log probability and as many alternatives as asked for."""
        if chat:
            request = read(logprobs=True, top_logprobs=3, max_tokens=4)
        else:
            request = read(chat=False, prompt="a", logprobs=3, max_tokens=4)
        writer = Writer(request, "id", Vocabulary())
        whole = json.loads(writer.whole(usage_json(request, 4, None)))["choices"][0]["logprobs"]
        parts = [
            event["choices"][0]["logprobs"]
            for event in events(writer.chunk(0, 0, 1), writer.chunk(0, 1, 4))
        ]
        joined = {key: [one for part in parts for one in part[key]] for key in parts[0]}
        assert joined == whole
        if chat:
            assert [one["token"] for one in whole["content"]] == list(request.samples[0].pieces)
            assert all(len(one["top_logprobs"]) == 3 for one in whole["content"])
        else:
            text = "".join(request.samples[0].pieces)
            for token, offset in zip(whole["tokens"], whole["text_offset"], strict=True):
                assert text[offset:].startswith(token)
            assert all(one < 0 for one in whole["token_logprobs"])

    def test_token_ids_are_told_on_request(self):
        """With `return_token_ids` ids stand where vLLM puts them, and give the text back."""
        request = read(return_token_ids=True, max_tokens=3)
        vocabulary = Vocabulary()
        writer = Writer(request, "id", vocabulary)
        role, chunk = events(writer.first(), writer.chunk(0, 0, 3))
        assert vocabulary.words(role["prompt_token_ids"]) == list(request.samples[0].prompt)
        ids = chunk["choices"][0]["token_ids"]
        assert vocabulary.words(ids) == list(request.samples[0].tokens)


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


class Log:
    """Writes down what the engine's driver tells."""

    def __init__(self):
        self.pulls = []

    def tokens(self, answer, count, gap_s):
        pass

    def stepped(self, tokens):
        pass

    def pull(self, answer, tokens):
        self.pulls.append((answer, tokens))


def paced(dilation=100.0, log=None, **config):
    engine = Engine(EngineConfig(kv_blocks=100, max_num_seqs=4, **config), RowStepTime(ROW))
    return PacedEngine(engine, Clock(dilation), log or Log())


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
