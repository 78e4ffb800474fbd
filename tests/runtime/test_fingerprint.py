"""Prompt size and identity."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.fingerprint import CHUNK_BYTES, Prompt, TokenScale, read_prompt


def user(text, *more):
    return {"messages": [{"role": "user", "content": text}, *more]}


class TestReadPrompt:
    @given(start=st.text(min_size=1, max_size=600), one=st.text(), two=st.text())
    def test_equal_beginnings_share_leading_items(self, start, one, two):
        """Two prompts share at least the items of their common beginning, and no gap follows."""
        first = read_prompt({"prompt": start + one})
        second = read_prompt({"prompt": start + two})
        common = len(start.encode("utf-8", "replace")) // CHUNK_BYTES
        assert first.chain[:common] == second.chain[:common]
        same = [a == b for a, b in zip(first.chain, second.chain, strict=False)]
        assert same == sorted(same, reverse=True)

    def test_a_longer_conversation_extends_the_chain(self):
        """The next turn of a conversation begins with the items of the turn before."""
        turn = user("word " * 100)
        later = user("word " * 100, {"role": "assistant", "content": "fine " * 99})
        chain = read_prompt(turn).chain
        assert len(chain) == 3
        assert read_prompt(later).chain[:3] == chain
        assert read_prompt(later).head == read_prompt(turn).head

    def test_only_full_chunks_count(self):
        """A prompt shorter than a chunk has no items."""
        assert read_prompt({"prompt": "x" * (CHUNK_BYTES - 1)}).chain == ()
        assert len(read_prompt({"prompt": "x" * CHUNK_BYTES}).chain) == 1

    def test_salt_and_tools_change_everything(self):
        """A cache salt, or other tools, share no item."""
        plain = read_prompt(user("w" * 500)).chain
        salted = read_prompt({**user("w" * 500), "cache_salt": "tenant"}).chain
        tools = read_prompt({**user("w" * 500), "tools": [{"type": "function"}]}).chain
        assert len({plain[0], salted[0], tools[0]}) == 3

    def test_token_ids_count_exactly(self):
        """A prompt of token ids tells its length."""
        assert read_prompt({"prompt": [1, 2, 3]}).exact_tokens == 3

    @pytest.mark.parametrize(
        "payload",
        [
            {}, {"messages": None}, {"messages": [3, {"role": 1}, {"content": [7, {"text": 1}]}]},
            {"prompt": None}, {"prompt": {"a": 1}}, {"input": ["a", "b"]}, {"prompt": "\ud800"},
        ],
    )  # fmt: skip
    def test_odd_bodies_are_not_judged(self, payload):
        """Any JSON object has some fingerprint: refusing it is the endpoint's business."""
        assert read_prompt(payload).size_bytes >= 0

    def test_parts_of_text_equal_the_text(self):
        """Content in parts has the fingerprint of the joined text."""
        parts = user([{"type": "text", "text": "ab"}, {"type": "text", "text": "c" * 200}])
        assert read_prompt(parts) == read_prompt(user("ab" + "c" * 200))

    def test_items_are_the_same_in_every_process(self):
        """Chains survive a restart: they do not depend on the process's hash seed."""
        code = (
            "from runtime.fingerprint import read_prompt;"
            "print(read_prompt({'prompt': 'word ' * 100}).chain)"
        )
        out = subprocess.run(  # noqa: S603
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert out.stdout.strip() == str(read_prompt({"prompt": "word " * 100}).chain)


class TestTokenScale:
    def test_it_learns_the_engine_s_scale(self):
        """After some answers the estimate follows what the engine said, per model."""
        scale = TokenScale()
        prompt = Prompt(size_bytes=800, chain=(), head=0)
        assert scale.tokens(prompt, "m") == (200, 32.0)
        for _ in range(5):
            scale.learn("m", 600, 100)
        tokens, per_item = scale.tokens(prompt, "m")
        assert tokens == 133
        assert per_item == pytest.approx(CHUNK_BYTES / 6)
        assert scale.tokens(prompt, "other") == (200, 32.0)

    def test_exact_lengths_are_kept(self):
        """A prompt of token ids needs no estimate."""
        prompt = Prompt(size_bytes=256, chain=(1, 2), head=0, exact_tokens=64)
        assert TokenScale().tokens(prompt, "m") == (64, 32.0)
