"""Text of the mock endpoint: words are tokens, so hashing needs no tokenizer.

Rules
-----
* A token is a word (a run of characters without white space).
* The chat template costs four tokens a message (start, role, separator, end), and three for the
  beginning of the answer (start, ``assistant``, separator). An answer put back verbatim as an
  assistant message is therefore a continuation of its own prompt, and hits the prefix cache.
* A tool call costs a token for its start, one for the name and the words of its arguments.
* Tools are rendered in front, as a system message of their JSON.
* Answers are drawn word by word from a small vocabulary with a seed made of the prompt.
* Token ids are handed out as words are met; an id nobody handed out stands for a word of its own.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from zlib import crc32

__all__ = [
    "CALL",
    "Vocabulary",
    "block_chain",
    "call_tokens",
    "chat_tokens",
    "prompt_tokens",
    "reply_words",
]

CALL = "<|call|>"
_START, _SEPARATOR, _END = "<|start|>", "<|separator|>", "<|end|>"

_WORDS = (
    "the a plan run node graph call token queue first next last fast slow wait send hold cache "
    "prefix block batch step load share price model fleet route branch join loop tool answer "
    "check find read write open close begin end early late short long small large good better "
    "best one two three four five many few all none true false left right up down over under"
)
_VOCABULARY = tuple(_WORDS.split())


def chat_tokens(messages: Sequence[Mapping[str, Any]], tools: Any = None) -> list[str]:
    """Return the tokens of a rendered conversation, up to where the answer begins."""
    tokens: list[str] = []
    if tools:
        tokens += (_START, "tools", _SEPARATOR, *json.dumps(tools).split(), _END)
    for message in messages:
        tokens += (_START, str(message.get("role")), _SEPARATOR)
        tokens += _words(message.get("content"))
        calls = message.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            function = call.get("function") if isinstance(call, dict) else None
            if isinstance(function, dict):
                tokens += call_tokens(str(function.get("name")), str(function.get("arguments")))
        tokens.append(_END)
    tokens += (_START, "assistant", _SEPARATOR)
    return tokens


def call_tokens(name: str, arguments: str) -> list[str]:
    """Return the tokens of a tool call; its arguments are JSON text."""
    return [CALL, name, *arguments.split()]


def prompt_tokens(prompt: str) -> list[str]:
    """Return the tokens of a completion prompt."""
    return prompt.split()


def _words(content: Any) -> list[str]:
    if isinstance(content, str):
        return content.split()
    if isinstance(content, list):
        words: list[str] = []
        for part in content:
            text = part.get("text") if isinstance(part, dict) else None
            words += (text if isinstance(text, str) else json.dumps(part)).split()
        return words
    return [] if content is None else json.dumps(content).split()


def reply_words(seed: int, count: int, beginning: Sequence[str] = ()) -> list[str]:
    """Return ``count`` words of an answer, the given ones first, the same for the same seed."""
    words = list(beginning[:count])
    drawn = random.Random(seed).choices(_VOCABULARY, k=count - len(words))
    return words + drawn


class Vocabulary:
    """Token ids of words, both ways.

    Parameters
    ----------
    most
        Words it keeps; those met later share id 0.
    """

    __slots__ = ("_ids", "_most", "_words")

    def __init__(self, most: int = 1 << 18) -> None:
        self._most = most
        self._words = ["<unk>", *dict.fromkeys((_START, _SEPARATOR, _END, CALL, *_VOCABULARY))]
        self._ids = {word: number for number, word in enumerate(self._words)}

    def ids(self, words: Iterable[str]) -> list[int]:
        """Return the id of each word, new ones for new words."""
        return [self._id(word) for word in words]

    def words(self, ids: Iterable[int]) -> list[str]:
        """Return the word of each id."""
        known = self._words
        return [known[one] if 0 <= one < len(known) else f"<{one}>" for one in ids]

    def _id(self, word: str) -> int:
        number = self._ids.get(word)
        if number is None:
            if len(self._words) >= self._most:
                return 0
            number = self._ids[word] = len(self._words)
            self._words.append(word)
        return number


def block_chain(tokens: Sequence[str], block_tokens: int, salt: str = "") -> tuple[int, ...]:
    """Return the hash chain of the full blocks of a token sequence.

    Parameters
    ----------
    tokens
        Prompt, and the answer to come.
    block_tokens
        Tokens per block, >= 1.
    salt
        vLLM's ``cache_salt``: changes the whole chain.
    """
    chain: list[int] = []
    parent = crc32(salt.encode())
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        text = " ".join(tokens[start : start + block_tokens])
        parent = hash((parent, crc32(text.encode("utf-8", "replace"))))
        chain.append(parent)
    return tuple(chain)
