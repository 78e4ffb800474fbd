"""Readers of public agent logs: each gives one step table (see `models.features.STEP_COLUMNS`).

Where a log has no tool times, they are estimated. A gap between two calls is generation plus tool
run; `answer_seconds` takes the generation out with a first-token time and a decode speed read
from the fast edge of the log itself, so the delays are estimates with an error of about a second.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd

from models.features import steps
from models.tables import Dataset, Sieve, file_hash, read_table, split_groups

__all__ = [
    "answer_seconds",
    "command_words",
    "read_claude_code",
    "read_lmcache",
    "read_miniswe",
    "read_tau_bench",
    "read_who_and_when",
]

MAX_TOKENS = 5e6
MAX_DELAY_S = 7 * 86400.0
LONG_ANSWER_TOKENS = 400.0
_CHANGE_DIRECTORY = re.compile(r"^\s*cd\s+\S+\s*(?:&&|;)\s*")
_TURN_TARGET = re.compile(r"->.*")
_SUFFIX = re.compile(r"\.[A-Za-z0-9]{1,4}$")


def command_words(command: str) -> str:
    """Return what a shell command runs, coarsely: its first word and the shape of the second.

    A leading ``cd folder &&`` is skipped, and a file name counts by its suffix, so that
    ``cd a && python b/c.py`` gives ``python .py``.
    """
    words = _CHANGE_DIRECTORY.sub("", command).split()[:2]
    if len(words) == 2 and ("/" in words[1] or _SUFFIX.search(words[1])):
        suffix = _SUFFIX.search(words[1])
        words[1] = suffix.group() if suffix else "/"
    return " ".join(word[:24] for word in words)


def answer_seconds(gap_s: pd.Series, output_tokens: pd.Series) -> pd.Series:
    """Return an estimate of the part of each gap that was generation, in seconds.

    Notes
    -----
    ``first_token_s + output_tokens / speed``. The speed is the 0.9 quantile of tokens per second
    over answers of at least 400 tokens (the longest tenth if there are none), whose gaps are
    mostly generation; the first-token time is the 0.1 quantile of what is then left. Both read
    the fast edge, so that tool time is rather over- than underestimated.
    """
    known = gap_s.notna() & (gap_s > 0)
    if not known.any():
        return pd.Series(0.0, index=gap_s.index)
    gap, tokens = gap_s[known], output_tokens[known]
    long = tokens >= min(LONG_ANSWER_TOKENS, float(tokens.quantile(0.9)))
    speed = float((tokens[long] / gap[long]).quantile(0.9))
    first = max(0.0, float((gap - tokens / speed).quantile(0.1)))
    return first + output_tokens / speed


def read_lmcache(folder: Path, seed: int) -> Dataset:
    """Read `lmcache_agents` (Magentic team, mini-swe-agent, tau-bench); split by session.

    ``t_s`` is when a call was logged as sent: gaps follow the length of the call's own answer.
    """
    path = folder / "calls.csv"
    raw = read_table(
        path,
        numeric=[
            "idx", "in_chars", "in_tok_est", "out_tok_est", "shared_prefix_chars", "gap_to_next_s",
        ],
        text=["agent", "session_id", "node", "next_action"],
    )  # fmt: skip
    sieve = Sieve(raw, "lmcache_agents/calls.csv")
    sieve.require("in_tok_est", 1, MAX_TOKENS)
    sieve.require("out_tok_est", 1, MAX_TOKENS)
    sieve.require("in_chars", 1, 1e8)
    sieve.reject(sieve.frame["gap_to_next_s"] < 0, "gap_to_next_s is negative")
    rows = sieve.frame
    generation = pd.concat(
        [
            answer_seconds(part["gap_to_next_s"], part["out_tok_est"])
            for _, part in rows.groupby("agent")
        ]
        or [pd.Series(dtype=float)]
    )
    session = rows["agent"] + "/" + rows["session_id"]
    chars = rows["shared_prefix_chars"].fillna(0.0).clip(0.0, rows["in_chars"])
    table = steps(
        session_id=session,
        family=session,
        step=rows["idx"],
        kind=rows["agent"],
        site=rows["node"],
        prompt_tokens=rows["in_tok_est"],
        shared_prefix_tokens=np.floor(chars / rows["in_chars"] * rows["in_tok_est"]),
        output_tokens=rows["out_tok_est"],
        action=rows["next_action"],
        delay_s=(rows["gap_to_next_s"] - generation).clip(lower=0.0),
        held_out=split_groups(session, seed),
    )
    return _agent_dataset("lmcache_agents", "30 % of the sessions held out", table, sieve, path)


def read_miniswe(folder: Path, seed: int) -> Dataset:
    """Read `miniswe_swebench_verified`; split by instance.

    The prompt only ever grows, so a call shares the previous prompt and answer as its prefix.
    """
    path = folder / "steps.csv"
    raw = read_table(
        path,
        numeric=[
            "step", "prompt_tokens", "completion_tokens", "gap_to_next_s", "cmd_chars",
            "returncode",
        ],
        text=["instance_id", "cmd_class", "cmd_head"],
    )  # fmt: skip
    sieve = Sieve(raw, "miniswe_swebench_verified/steps.csv")
    sieve.require("prompt_tokens", 1, MAX_TOKENS)
    sieve.require("completion_tokens", 1, MAX_TOKENS)
    sieve.reject(sieve.frame["gap_to_next_s"] < 0, "gap_to_next_s is negative")
    sieve.reject(sieve.frame["gap_to_next_s"] > MAX_DELAY_S, "gap_to_next_s above a week")
    rows = sieve.frame.sort_values(["instance_id", "step"])
    earlier = rows.groupby("instance_id")[["prompt_tokens", "completion_tokens"]].shift(1)
    generation = answer_seconds(rows["gap_to_next_s"], rows["completion_tokens"])
    status = np.where(rows["returncode"].isna(), "", np.where(rows["returncode"] == 0, "ok", "bad"))
    table = steps(
        session_id=rows["instance_id"],
        family=rows["instance_id"],
        step=rows["step"],
        kind="miniswe",
        site="agent",
        prompt_tokens=rows["prompt_tokens"],
        shared_prefix_tokens=earlier.sum(axis=1).clip(upper=rows["prompt_tokens"]),
        output_tokens=rows["completion_tokens"],
        action=rows["cmd_class"],
        words=rows["cmd_head"].map(command_words),
        argument_chars=rows["cmd_chars"],
        status=status,
        delay_s=(rows["gap_to_next_s"] - generation).clip(lower=0.0),
        held_out=split_groups(rows["instance_id"], seed),
    )
    return _agent_dataset(
        "miniswe_swebench_verified", "30 % of the instances held out", table, sieve, path
    )


def read_claude_code(folder: Path, seed: int) -> Dataset:
    """Read `claude_code_sessions`; split by family, because traces of one family repeat calls.

    ``output_types`` and ``stop`` belong to the answer: they are the step's action, seen by the
    features of later steps only.
    """
    path = folder / "requests.csv"
    raw = read_table(
        path,
        numeric=[
            "idx", "in_tokens", "out_tokens", "think_time_s", "shared_prefix_blocks", "repeat",
        ],
        text=[
            "trace_id", "family", "scope", "stream", "model", "input_types", "output_types", "stop",
        ],
    )  # fmt: skip
    sieve = Sieve(raw, "claude_code_sessions/requests.csv")
    sieve.reject(sieve.frame["repeat"] > 0, "repeats a call of its family")
    sieve.require("in_tokens", 1, MAX_TOKENS)
    sieve.require("out_tokens", 1, MAX_TOKENS)
    sieve.reject(sieve.frame["think_time_s"] < 0, "think_time_s is negative")
    sieve.reject(sieve.frame["think_time_s"] > MAX_DELAY_S, "think_time_s above a week")
    rows = sieve.frame.assign(session=sieve.frame["trace_id"] + "/" + sieve.frame["scope"])
    rows = rows.sort_values(["session", "idx"])
    inner = rows["scope"].where(rows["scope"] == "main", "sub")
    table = steps(
        session_id=rows["session"],
        family=rows["family"],
        step=rows["idx"],
        kind=inner,
        site=inner,
        model=rows["model"],
        input_kind=rows["input_types"] + "/" + rows["stream"],
        prompt_tokens=rows["in_tokens"],
        shared_prefix_tokens=(64.0 * rows["shared_prefix_blocks"]).clip(upper=rows["in_tokens"]),
        output_tokens=rows["out_tokens"],
        action=rows["output_types"],
        words=rows["stop"],
        delay_s=rows.groupby("session")["think_time_s"].shift(-1),
        held_out=split_groups(rows["family"], seed),
    )
    return _agent_dataset(
        "claude_code_sessions", "30 % of the families held out", table, sieve, path
    )


def read_tau_bench(folder: Path, seed: int) -> Dataset:
    """Read `tau_bench_airline`; split by task (its four trials stay together). It has no times."""
    path = folder / "messages.csv"
    raw = read_table(
        path,
        numeric=["idx", "context_tok_est", "msg_tok_est", "arg_chars"],
        text=["task_id", "trial", "role", "kind", "tool_name", "prev_tool"],
    )
    sieve = Sieve(raw, "tau_bench_airline/messages.csv")
    sieve.reject(sieve.frame["role"] != "assistant", "not written by the model")
    sieve.require("context_tok_est", 1, MAX_TOKENS)
    sieve.require("msg_tok_est", 1, MAX_TOKENS)
    rows = sieve.frame
    action = rows["tool_name"].where(rows["kind"] == "tool_call", "answer")
    table = steps(
        session_id=rows["task_id"] + "/" + rows["trial"],
        family=rows["task_id"],
        step=rows["idx"],
        kind="tau_bench",
        site="agent",
        prompt_tokens=rows["context_tok_est"],
        output_tokens=rows["msg_tok_est"],
        action=action,
        argument_chars=rows["arg_chars"],
        held_out=split_groups(rows["task_id"], seed),
    )
    return _agent_dataset("tau_bench_airline", "30 % of the tasks held out", table, sieve, path)


def read_who_and_when(folder: Path, seed: int) -> Dataset:
    """Read `who_and_when`; split by log. A step's action is the next speaker. It has no times.

    A step's words are the kind of its turn: a Magentic orchestrator that hands over to a rare agent
    is followed by the same short note as one that hands over to a common one.
    """
    path = folder / "steps.csv"
    raw = read_table(
        path,
        numeric=["step", "context_tok_est", "msg_tok_est"],
        text=["log_id", "agent", "role", "prev_agent"],
    )
    sieve = Sieve(raw, "who_and_when/steps.csv")
    sieve.require("msg_tok_est", 1, MAX_TOKENS)
    sieve.require("context_tok_est", 0, MAX_TOKENS)
    sieve.reject(sieve.frame["role"] == "human", "written by a person")
    rows = sieve.frame.sort_values(["log_id", "step"])
    table = steps(
        session_id=rows["log_id"],
        family=rows["log_id"],
        step=rows["step"],
        kind=rows["log_id"].str.split("_").str[0],
        site=rows["agent"],
        prompt_tokens=rows["context_tok_est"],
        output_tokens=rows["msg_tok_est"],
        action=rows.groupby("log_id")["agent"].shift(-1).fillna("end"),
        words=rows["agent"].str.replace(_TURN_TARGET, "->", regex=True),
        held_out=split_groups(rows["log_id"], seed),
    )
    return _agent_dataset("who_and_when", "30 % of the logs held out", table, sieve, path)


def _agent_dataset(name: str, split: str, table: pd.DataFrame, sieve: Sieve, path: Path) -> Dataset:
    return Dataset(
        name=name,
        split=split,
        rows_read=sieve.rows_read,
        set_aside=sieve.set_aside,
        data_hash=file_hash(path),
        window=f"{table['session_id'].nunique()} sessions",
        calls=table,
        delays=table[table["delay_s"].notna()] if table["delay_s"].notna().any() else None,
        choices=table if (table["action"] != "").any() else None,
    )
