"""Readers of public service logs: arrivals with lengths, and per-request latencies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from models.features import steps
from models.tables import Dataset, Sieve, file_hash, read_table, split_tail
from planner.domain.errors import InvalidInput
from planner.domain.files import read_jsonl

__all__ = ["read_azure", "read_llm_pilot", "read_mooncake", "read_vllm_bench"]

MAX_TOKENS = 5e6
MOONCAKE_BLOCK_TOKENS = 512
LEAST_SHARED_BLOCKS = 2
"""One block in common may be a system prompt."""


def _only(folder: Path, pattern: str) -> Path:
    """Return the one file of a folder that fits a pattern: a whole trace or a slice of it."""
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise InvalidInput(
            f"one file {pattern} is needed, found {names}",
            where=str(folder),
            remedy="fetch it with `almanac data get`, or keep only one",
        )
    return found[0]


def read_azure(folder: Path, part: str) -> Dataset:
    """Read one service of `azure_llm_2023` (``part`` is ``code`` or ``conv``); split by time."""
    path = _only(folder, f"{part}*.csv")
    raw = read_table(path, numeric=["ContextTokens", "GeneratedTokens"], text=["TIMESTAMP"])
    stamp = pd.to_datetime(raw["TIMESTAMP"], errors="coerce", format="ISO8601")
    wrong = np.flatnonzero(stamp.isna().to_numpy())
    if wrong.size:
        raise InvalidInput(
            f"{raw['TIMESTAMP'].iloc[wrong[0]]!r} is not a time",
            where=f"{path}:{wrong[0] + 2}: TIMESTAMP",
            remedy="write year-month-day hour:minute:second",
        )
    seconds = (stamp - stamp.min()).dt.total_seconds()
    frame = pd.DataFrame(
        {
            "time_s": seconds,
            "prompt_tokens": raw["ContextTokens"],
            "output_tokens": raw["GeneratedTokens"],
        }
    )
    return _service(f"azure_{part}", frame, path)


def read_mooncake(folder: Path) -> Dataset:
    """Read the conversation trace of `mooncake_fast25`; split by time.

    Equal block ids mean an equal prefix, so a request whose prompt begins with at least
    `LEAST_SHARED_BLOCKS` blocks of an earlier one is the next turn of that conversation.
    """
    path = _only(folder, "conversation*.jsonl")
    values: dict[str, list[float]] = {"time_s": [], "prompt_tokens": [], "output_tokens": []}
    blocks: list[list[int]] = []
    fields = (("timestamp", "time_s", 1e-3), ("input_length", "prompt_tokens", 1.0))
    for number, row in read_jsonl(path, what="Mooncake trace"):
        for source, target, unit in (*fields, ("output_length", "output_tokens", 1.0)):
            value = row.get(source) if isinstance(row, dict) else None
            if value is not None and (
                isinstance(value, bool) or not isinstance(value, (int, float))
            ):
                raise InvalidInput(
                    f"{value!r:.40} is not a number",
                    where=f"{path}:{number}: {source}",
                    remedy="correct it",
                )
            values[target].append(np.nan if value is None else value * unit)
        ids = row.get("hash_ids", []) if isinstance(row, dict) else []
        if not isinstance(ids, list):
            raise InvalidInput(
                f"{ids!r:.40} is not a list of block ids",
                where=f"{path}:{number}: hash_ids",
                remedy="correct it",
            )
        blocks.append(ids)
    frame = pd.DataFrame(values)
    return _service("mooncake_conversation", frame.join(_conversations(frame, blocks)), path)


def _conversations(frame: pd.DataFrame, blocks: list[list[int]]) -> pd.DataFrame:
    """Return, per request, its conversation and the prompt tokens shared with the one before."""
    owner: dict[int, int] = {}
    conversation = [""] * len(frame)
    shared = np.zeros(len(frame))
    for place in np.argsort(frame["time_s"].to_numpy(), kind="stable"):
        ids = blocks[place]
        depth = next((n for n in range(len(ids), 0, -1) if ids[n - 1] in owner), 0)
        if depth >= LEAST_SHARED_BLOCKS:
            conversation[place] = conversation[owner[ids[depth - 1]]]
        else:
            conversation[place] = f"{place:08d}"
        shared[place] = min(depth * MOONCAKE_BLOCK_TOKENS, frame["prompt_tokens"].iloc[place])
        owner |= dict.fromkeys(ids, int(place))
    return pd.DataFrame({"conversation": conversation, "shared": shared}, index=frame.index)


def _service(name: str, frame: pd.DataFrame, path: Path) -> Dataset:
    sieve = Sieve(frame, f"{path.parent.name}/{path.name}")
    sieve.require("time_s", 0, 1e9)
    sieve.require("prompt_tokens", 1, MAX_TOKENS)
    sieve.require("output_tokens", 1, MAX_TOKENS)
    rows = sieve.frame.sort_values("time_s", kind="stable").reset_index(drop=True)
    if "conversation" not in rows.columns:
        alone = pd.Series([f"{position:08d}" for position in range(len(rows))], dtype=object)
        rows = rows.assign(conversation=alone, shared=np.nan)
    calls = steps(
        session_id=rows["conversation"],
        family=rows["conversation"],
        step=rows.groupby("conversation").cumcount(),
        kind="service",
        site=name,
        prompt_tokens=rows["prompt_tokens"],
        shared_prefix_tokens=rows["shared"],
        output_tokens=rows["output_tokens"],
        held_out=split_tail(rows["time_s"]),
    )
    minutes = (float(rows["time_s"].max()) if len(rows) else 0.0) / 60
    return Dataset(
        name=name,
        split="last 30 % in time held out",
        rows_read=sieve.rows_read,
        set_aside=sieve.set_aside,
        data_hash=file_hash(path),
        window=f"{minutes:.0f} minutes",
        calls=calls,
        arrivals=rows[["time_s", "prompt_tokens", "output_tokens"]],
    )


def read_llm_pilot(folder: Path, seed: int) -> Dataset:
    """Read `llm_pilot_tgi`: closed-loop requests of several models and GPUs.

    Held out: one load level (number of users) per configuration, never the lowest or highest, and
    a fifth of the rows of the other levels at random. Average load during the request and token
    gaps belong to the outcome and are not features.
    """
    path = folder / "requests.csv"
    raw = read_table(
        path,
        numeric=[
            "n_gpus", "num_users", "in_tokens", "out_tokens", "latency_ms", "ttft_ms",
            "active_at_start", "active_in_tokens_at_start", "start_ms",
        ],
        text=["model", "gpu"],
    )  # fmt: skip
    sieve = Sieve(raw, "llm_pilot_tgi/requests.csv")
    sieve.require("in_tokens", 1, MAX_TOKENS)
    sieve.require("out_tokens", 1, MAX_TOKENS)
    sieve.require("ttft_ms", 1, 3.6e6)
    sieve.require("latency_ms", 1, 3.6e6)
    sieve.require("active_at_start", 1, 1e5)
    sieve.require("start_ms", 0, 1e9)
    sieve.reject(sieve.frame["latency_ms"] < sieve.frame["ttft_ms"], "latency below ttft_ms")
    rows = sieve.frame.reset_index(drop=True)
    config = rows["model"] + " on " + rows["n_gpus"].astype(int).astype(str) + " x " + rows["gpu"]
    generator = np.random.default_rng(seed)
    level = pd.Series("", index=rows.index)
    for name in sorted(config.unique()):
        inner = sorted(rows.loc[config == name, "num_users"].unique())[1:-1]
        if inner:
            chosen = inner[int(generator.integers(len(inner)))]
            level[(config == name) & (rows["num_users"] == chosen)] = "unseen load"
    random_row = (level == "") & (generator.random(len(rows)) < 0.2)
    requests = pd.DataFrame(
        {
            "config": config,
            "run": config + ", " + rows["num_users"].astype(int).astype(str) + " users",
            "sent_s": rows["start_ms"] / 1e3,
            "prompt_tokens": rows["in_tokens"],
            "calls": rows["active_at_start"],
            "kv_tokens": rows["active_in_tokens_at_start"].fillna(rows["in_tokens"]),
            "output_tokens": rows["out_tokens"],
            "ttft_s": rows["ttft_ms"] / 1e3,
            "decode_s": (rows["latency_ms"] - rows["ttft_ms"]) / 1e3,
            "held_out": level.where(~random_row, "known load"),
        }
    )
    return Dataset(
        name="llm_pilot_tgi",
        split="per configuration one inner load level, and 20 % of the other rows, held out",
        rows_read=sieve.rows_read,
        set_aside=sieve.set_aside,
        data_hash=file_hash(path),
        window=f"{config.nunique()} configurations",
        requests=requests,
    )


def read_vllm_bench(folder: Path) -> Dataset:
    """Read `vllm_bench_llmservingsim`: open-loop vLLM logs on two GPUs; split by time.

    Times count from admission (the engine's queue is taken out: it is a matter of the KV pool,
    which the simulator models). The load is what was running at admission, the call included.
    """
    path = folder / "requests.csv"
    raw = read_table(
        path,
        numeric=[
            "tp", "in_tokens", "out_tokens", "queue_s", "ttft_s", "e2e_s", "queued_rel_s",
        ],
        text=["gpu", "model"],
    )  # fmt: skip
    sieve = Sieve(raw, "vllm_bench_llmservingsim/requests.csv")
    sieve.require("in_tokens", 1, MAX_TOKENS)
    sieve.require("out_tokens", 1, MAX_TOKENS)
    for column in ("queue_s", "ttft_s", "e2e_s", "queued_rel_s"):
        sieve.require(column, 0, 1e6)
    frame = sieve.frame
    sieve.reject(frame["ttft_s"] <= frame["queue_s"], "first token before admission")
    rows = sieve.frame.reset_index(drop=True)
    config = rows["model"] + " on " + rows["tp"].astype(int).astype(str) + " x " + rows["gpu"]
    admitted = rows["queued_rel_s"] + rows["queue_s"]
    finish = rows["queued_rel_s"] + rows["e2e_s"]
    calls, kv_tokens = np.ones(len(rows)), rows["in_tokens"].to_numpy(copy=True)
    held_out = pd.Series("", index=rows.index)
    for name in sorted(config.unique()):
        here = np.flatnonzero(config == name)
        start, end = admitted[here].to_numpy(), finish[here].to_numpy()
        running = (start[None, :] < start[:, None]) & (end[None, :] > start[:, None])
        # A running call has written about the elapsed share of its answer.
        share = np.clip((start[:, None] - start[None, :]) / (end - start)[None, :], 0, 1)
        context = rows["in_tokens"].to_numpy()[here] + share * rows["out_tokens"].to_numpy()[here]
        calls[here] += running.sum(axis=1)
        kv_tokens[here] += (running * context).sum(axis=1)
        held_out[here[split_tail(admitted[here]).to_numpy()]] = "later requests"
    requests = pd.DataFrame(
        {
            "config": config,
            "run": config,
            "sent_s": admitted,
            "prompt_tokens": rows["in_tokens"],
            "calls": calls,
            "kv_tokens": kv_tokens,
            "output_tokens": rows["out_tokens"],
            "ttft_s": rows["ttft_s"] - rows["queue_s"],
            "decode_s": rows["e2e_s"] - rows["ttft_s"],
            "held_out": held_out,
        }
    )
    return Dataset(
        name="vllm_bench_llmservingsim",
        split="last 30 % in time of each run held out",
        rows_read=sieve.rows_read,
        set_aside=sieve.set_aside,
        data_hash=file_hash(path),
        window=f"{config.nunique()} runs of {len(rows) // max(1, config.nunique())} requests",
        requests=requests,
    )
