"""Readers name what is wrong with a file, count what is wrong with a row, and split honestly."""

import numpy as np
import pandas as pd
import pytest

from models.importers import agent_sessions, arrivals, read_folder
from models.importers.agents import answer_seconds, command_words, read_claude_code, read_lmcache
from models.importers.own import read_own_traces
from models.importers.services import read_azure, read_mooncake
from models.tables import split_groups
from planner.domain.errors import InvalidInput
from planner.domain.trace import CallRecord, RunRecord, save_trace

CLAUDE = (
    "trace_id,family,scope,idx,stream,model,in_tokens,out_tokens,think_time_s,input_types,"
    "output_types,stop,shared_prefix_blocks,repeat\n"
)


def _claude(folder, rows):
    folder = folder / "claude_code_sessions"
    folder.mkdir(parents=True)
    (folder / "requests.csv").write_text(CLAUDE + "\n".join(rows) + "\n", encoding="utf-8")
    return folder


def _row(trace="t1", family="t1", idx=0, inp=1000, out=50, think=0.0, shared=0, repeat=0):
    return f"{trace},{family},main,{idx},s,m,{inp},{out},{think},text,tool_use,tool_use,{shared},{repeat}"  # noqa: E501


def test_unusable_rows_are_counted_not_dropped(tmp_path):
    """Missing, negative, absurd and repeated rows are set aside with their reason and number."""
    folder = _claude(
        tmp_path,
        [_row(), _row(idx=1, out=-3), _row(idx=2, inp=""), _row(idx=3, repeat=1), _row(idx=4)],
    )
    data = read_claude_code(folder, seed=0)
    assert data.rows_read == 5
    assert len(data.calls) == 2
    assert {(one.reason, one.rows) for one in data.set_aside} == {
        ("repeats a call of its family", 1),
        ("in_tokens is missing", 1),
        ("out_tokens outside [1, 5e+06]", 1),
    }


def test_families_stay_on_one_side(tmp_path):
    """Traces of one family are all held out or all kept, and both sides have some."""
    rows = [_row(trace=f"t{i}", family=f"f{i // 2}") for i in range(40)]
    calls = read_claude_code(_claude(tmp_path, rows), seed=0).calls
    assert (calls.groupby("family")["held_out"].nunique() == 1).all()
    assert 0 < calls["held_out"].mean() < 1


def test_adding_groups_moves_no_group():
    """A group's side depends on its name and the seed alone."""
    few = pd.Series([f"g{i}" for i in range(30)])
    many = pd.Series([f"g{i}" for i in range(60)])
    assert split_groups(few, 1).tolist() == split_groups(many, 1).tolist()[:30]
    assert split_groups(few, 1).tolist() != split_groups(few, 2).tolist()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["requests.csv", "no such table"]),
        ("", ["requests.csv", "not a readable CSV"]),
        ("trace_id,family\na,b\n", ["requests.csv", "'idx'", "is missing"]),
        (CLAUDE + _row(inp="many") + "\n", ["requests.csv:2", "in_tokens", "'many'"]),
    ],
)
def test_a_broken_table_is_one_clear_error(tmp_path, content, parts):
    """A file that cannot be read names itself, the column, the line and the value."""
    folder = tmp_path / "claude_code_sessions"
    folder.mkdir()
    if content is not None:
        (folder / "requests.csv").write_text(content, encoding="utf-8")
    with pytest.raises(InvalidInput) as caught:
        read_folder(folder, seed=0)
    assert all(part in str(caught.value) for part in parts)
    assert caught.value.remedy


def test_bad_mooncake_and_azure_values_name_their_line(tmp_path):
    """A wrong type in a JSON row or a wrong time in a CSV row is named with its line."""
    moon = tmp_path / "mooncake_fast25"
    moon.mkdir()
    (moon / "conversation_first60pct.jsonl").write_text(
        '{"timestamp": 0, "input_length": 5, "output_length": 5}\n'
        '{"timestamp": "x", "input_length": 5, "output_length": 5}\n',
        encoding="utf-8",
    )
    with pytest.raises(InvalidInput, match=r"pct\.jsonl:2: timestamp"):
        read_mooncake(moon)
    azure = tmp_path / "azure_llm_2023"
    azure.mkdir()
    (azure / "code_first60pct.csv").write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\nnoon,5,6\n", encoding="utf-8"
    )
    with pytest.raises(InvalidInput, match=r"code_first60pct\.csv:2: TIMESTAMP"):
        read_azure(azure, "code")


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_nothing_to_learn_from_is_an_error(tmp_path, name):
    """A path that does not exist and a folder without data each say what to give."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput) as caught:
        read_folder(tmp_path / name, seed=0)
    assert caught.value.remedy


def test_a_foreign_jsonl_is_refused(tmp_path):
    """A .jsonl file without our header is an error that names it, not silence."""
    (tmp_path / "other.jsonl").write_text('{"a": 1}\n', encoding="utf-8")
    with pytest.raises(InvalidInput, match=r"other\.jsonl:1"):
        read_folder(tmp_path, seed=0)


def test_own_rows_that_cannot_be_used_are_counted(tmp_path, make_records):
    """Failed calls, negative lengths and disordered times of our traces are set aside."""
    good = make_records(runs=10)
    call = next(one for one in good if isinstance(one, CallRecord))
    base = {name: getattr(call, name) for name in CallRecord.__dataclass_fields__}
    bad = [
        CallRecord(**{**base, "call_id": "x", "status": "failed"}),
        CallRecord(**{**base, "call_id": "y", "output_tokens": -1}),
        CallRecord(**{**base, "call_id": "z", "first_token_s": 1e6}),
        RunRecord(run_id="q", workflow="demo", workflow_hash="h", arrival_s=5, finish_s=1),
    ]
    save_trace([*good, *bad], tmp_path / "t.jsonl")
    own = read_own_traces([tmp_path / "t.jsonl"])
    reasons = {one.reason: one.rows for one in own.dataset.set_aside}
    assert reasons == {
        "call not ok": 1,
        "output_tokens is negative or not finite": 1,
        "times out of order": 1,
        "finish before arrival": 1,
    }
    assert own.dataset.rows_read == len(good) + len(bad)


def test_own_traces_split_by_time(trace_folder):
    """Later runs are held out, whole, in every table."""
    own = read_own_traces(sorted(trace_folder.glob("*.jsonl")))
    assert own.runs.loc[own.runs["held_out"], "arrival_s"].min() > (
        own.runs.loc[~own.runs["held_out"], "arrival_s"].max()
    )
    assert own.runs["held_out"].mean() == pytest.approx(0.3, abs=0.05)
    late = set(own.runs.loc[own.runs["held_out"], "run"])
    for table in (own.calls, own.tools, own.branches):
        assert set(table.loc[table["held_out"], "run"]) <= late


def test_parallel_visits_share_no_history(tmp_path):
    """A call dispatched while its site's other visit still runs knows nothing of its answer."""

    def call(number, ready, finish):
        return CallRecord(
            run_id="r", call_id=f"c{number}", workflow_hash="h", node="n", site="n#0",
            ready_s=ready, sent_s=ready, first_token_s=ready, finish_s=finish, endpoint="e",
            prompt_tokens=10, output_tokens=10, visit=number,
        )  # fmt: skip

    save_trace([call(0, 0, 5), call(1, 1, 4), call(2, 6, 7)], tmp_path / "t.jsonl")
    table = read_own_traces([tmp_path / "t.jsonl"]).dataset.calls
    sessions = dict(zip(table["step"], table["session_id"], strict=True))
    assert sessions[0] != sessions[1]
    assert sessions[1] == sessions[2]


def test_command_words():
    """A command counts by its program and the shape of its argument."""
    assert command_words("cd /repo && python tests/run.py -x") == "python .py"
    assert command_words("cat <<'EOF' > a.py") == "cat <<'EOF'"
    assert command_words("ls /a/b") == "ls /"
    assert command_words("") == ""


def test_generation_is_taken_out_of_gaps():
    """With a known speed and fast tools the estimated generation comes close to the true one."""
    rng = np.random.default_rng(0)
    tokens = pd.Series(rng.integers(20, 2000, 4000).astype(float))
    truth = 1.5 + tokens / 80
    gap = truth + rng.exponential(0.5, 4000)
    estimate = answer_seconds(gap, tokens)
    assert float((estimate - truth).abs().median()) < 0.5
    assert float(answer_seconds(gap * np.nan, tokens).sum()) == 0.0


def test_replay_records_of_the_public_sets(public_data):
    """Sessions and arrivals of the public data are complete, ordered and non-negative."""
    for name, source in (
        ("lmcache_agents", "lmcache_agents/"),
        ("miniswe_swebench_verified", "miniswe"),
    ):
        sessions = agent_sessions(public_data / name)
        assert sessions
        assert all(one.source.startswith(source) for one in sessions)
        for call in (call for one in sessions for call in one.calls):
            assert call.prompt_tokens >= 1
            assert call.output_tokens >= 1
            assert 0 <= call.shared_prefix_tokens <= call.prompt_tokens
            assert call.gap_s >= 0
    for name in ("azure_code", "azure_conv", "mooncake_conversation"):
        found = arrivals(public_data, name)
        assert found.time_s[0] == 0
        assert (np.diff(found.time_s) >= 0).all()
        assert len(found.time_s) == len(found.prompt_tokens) == len(found.output_tokens) > 1000


def test_unknown_names_are_refused(tmp_path):
    """Unknown arrival traces and agent folders list the known ones."""
    with pytest.raises(InvalidInput, match="azure_code"):
        arrivals(tmp_path, "nothing")
    with pytest.raises(InvalidInput, match="lmcache_agents"):
        agent_sessions(tmp_path / "nothing")


def test_lmcache_generation_is_split_per_agent(public_data):
    """Each agent system has its own generation speed, so delays stay below the logged gaps."""
    data = read_lmcache(public_data / "lmcache_agents", seed=0)
    assert (data.calls["delay_s"].dropna() >= 0).all()
    assert data.calls["held_out"].groupby(data.calls["family"]).nunique().max() == 1
