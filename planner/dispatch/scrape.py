"""An engine's ``/metrics`` as a `Scrape`: the text format of Prometheus, and vLLM's names.

Names are those of vLLM 0.10 to 0.2x; where one was renamed the older one is read as well. Counters
and gauges of several engines behind one server (data parallel) are added up.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping

from planner.dispatch.online import Scrape
from planner.domain.errors import InvalidInput

__all__ = ["parse_metrics", "read_scrape"]

_SAMPLE = re.compile(r"([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+-?\d+)?\s*$", re.ASCII)
_LABEL = re.compile(r'([A-Za-z_]\w*)="((?:[^"\\]|\\.)*)"', re.ASCII)
_ESCAPED = re.compile(r"\\(.)")
_STEPS = ("iteration_tokens_total_count",)
_GENERATED = ("generation_tokens_total",)
_PROMPT = ("prompt_tokens_total",)
_PROMPTS = ("request_prompt_tokens_count",)
_RUNNING = ("num_requests_running",)
_CACHED = ("prefix_cache_hits_total", "gpu_prefix_cache_hits_total")
_USAGE = ("kv_cache_usage_perc", "gpu_cache_usage_perc")
_GAPS = ("inter_token_latency_seconds", "time_per_output_token_seconds")
_PREFIX = "vllm:"


def parse_metrics(text: str) -> Iterator[tuple[str, Mapping[str, str], float]]:
    """Give name, labels and value of each sample.

    Raises
    ------
    InvalidInput
        If a line is neither a sample nor a comment nor empty.
    """
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        found = _SAMPLE.match(line)
        value = _number(found[3]) if found else None
        if found is None or value is None:
            raise InvalidInput(
                f"{line[:80]!r} is not a sample of a metric",
                where=f"line {number}",
                remedy="give the text of GET /metrics, unchanged",
            )
        yield found[1], _labels(found[2] or ""), value


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _labels(text: str) -> dict[str, str]:
    plain = {"n": "\n"}
    return {
        name: _ESCAPED.sub(lambda found: plain.get(found[1], found[1]), value)
        for name, value in _LABEL.findall(text)
    }


def read_scrape(text: str, time_s: float, *, pool_tokens: float | None = None) -> Scrape:
    """Return what the text of one scrape says.

    Parameters
    ----------
    text
        Answer of ``GET /metrics``.
    time_s
        When it was asked for.
    pool_tokens
        Tokens of the KV pool; None reads them from ``cache_config_info``.

    Raises
    ------
    InvalidInput
        If the text is not in the format or lacks what a latency row needs.
    """
    sums: defaultdict[str, float] = defaultdict(float)
    engines: defaultdict[str, int] = defaultdict(int)
    pool = 0.0
    for name, labels, value in parse_metrics(text):
        if not name.startswith(_PREFIX):
            continue
        name = name.removeprefix(_PREFIX)
        sums[name] += value
        engines[name] += 1
        if name == "cache_config_info":
            pool += _pool_tokens(labels)
    pool = pool if pool_tokens is None else pool_tokens
    if not pool > 0:
        raise _lacks("cache_config_info with num_gpu_blocks")
    usage = next((name for name in _USAGE if name in sums), _USAGE[0])
    gaps = next((name for name in _GAPS if f"{name}_count" in sums), None)
    return Scrape(
        time_s=time_s,
        steps=_first(sums, _STEPS),
        generation_tokens=_first(sums, _GENERATED),
        prompt_tokens=_first(sums, _PROMPT),
        cached_tokens=_first(sums, _CACHED, 0.0),
        prompts=_first(sums, _PROMPTS, 0.0),
        running=_first(sums, _RUNNING),
        # The mean of the engines' shares of the sum of their pools.
        kv_tokens=_first(sums, _USAGE) / max(1, engines[usage]) * pool,
        gap_s=sums[f"{gaps}_sum"] if gaps else 0.0,
        gaps=sums[f"{gaps}_count"] if gaps else 0.0,
    )


def _first(
    sums: Mapping[str, float], names: tuple[str, ...], default: float | None = None
) -> float:
    value = next((sums[name] for name in names if name in sums), default)
    if value is None:
        raise _lacks(names[0])
    return value


def _lacks(name: str) -> InvalidInput:
    return InvalidInput(
        f"the scrape lacks {_PREFIX}{name}",
        where="/metrics",
        remedy="ask a vLLM server whose metrics are on, or give the pool's size if that is missing",
    )


def _pool_tokens(labels: Mapping[str, str]) -> float:
    try:
        return float(labels["num_gpu_blocks"]) * float(labels["block_size"])
    except (KeyError, ValueError):  # absent, or "None" until the engine has profiled its memory
        return 0.0
