"""Records that check themselves, and the files they are read from."""

import json
import math
from collections import deque
from dataclasses import replace
from pathlib import Path

import pytest

from planner.domain import run
from planner.domain.blocks import Segment, block_hashes
from planner.domain.errors import FleetError, InvalidInput, TraceFormatError, WorkflowError
from planner.domain.estimates import (
    LEVELS,
    EstimateTable,
    Quantiles,
    SiteEstimate,
    WorkflowEstimate,
    load_estimates,
    save_estimates,
)
from planner.domain.files import atomic_write, data_dir, read_json, read_yaml
from planner.domain.fleet import latency_rows, load_fleet
from planner.domain.ids import NodeId, SiteId
from planner.domain.latency import LatencyRow
from planner.domain.run import Task
from planner.domain.trace import CallRecord, RunRecord, load_trace, save_trace
from planner.domain.units import duration_to_ticks, ticks_to_seconds
from planner.domain.workflow import Workflow, load_workflow


def test_latency_row_adds_up() -> None:
    """A + b n + c n^2 alone, d + e B + f KV per decode step, all times the scale."""
    row = LatencyRow(
        prefill_base_ms=5,
        prefill_us_per_token=10,
        prefill_ns_per_token_sq=2,
        decode_base_ms=8,
        decode_us_per_call=30,
        decode_ns_per_kv_token=100,
    )
    assert row.prefill_s(1000) == pytest.approx(0.005 + 0.010 + 0.002)
    assert row.prefill_s(1000, depth=500) == pytest.approx(0.005 + 0.010 + 0.004)
    assert row.prefill_marginal_s(1000) == pytest.approx(0.012)
    assert row.decode_step_s(4, 10_000) == pytest.approx(0.008 + 0.00012 + 0.001)
    assert row.scaled(2.0).decode_step_s(4, 10_000) == pytest.approx(2 * 0.00912)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_latency_row_refuses_impossible_coefficients(value: float) -> None:
    """The error names the coefficient."""
    with pytest.raises(InvalidInput, match="decode_base_ms"):
        LatencyRow(
            prefill_base_ms=1,
            prefill_us_per_token=1,
            prefill_ns_per_token_sq=1,
            decode_base_ms=value,
            decode_us_per_call=1,
            decode_ns_per_kv_token=1,
        )


def test_bundled_latency_rows_name_their_source() -> None:
    """Each row of the table is usable, unique, and says where it comes from and how sure it is."""
    lines = (data_dir() / "latency_rows.csv").read_text().splitlines()
    assert len(latency_rows()) == len(lines) - 1
    for line in lines[1:]:
        assert ",measured," in line or ",estimate," in line
        assert line.endswith('"')


def test_blocks_agree_exactly_as_far_as_the_text_does() -> None:
    """Equal leading tokens give equal hashes, whatever the segment boundaries behind them."""
    shared = Segment(1, 40)
    one = block_hashes((shared, Segment(2, 60)))
    two = block_hashes((shared, Segment(3, 60)))
    assert len(one) == 100 // 16
    assert one[:2] == two[:2]
    assert one[2] != two[2]
    assert set(one[2:]).isdisjoint(two[2:])
    assert block_hashes((shared, Segment(2, 60)), salt=9)[0] != one[0]
    assert block_hashes((Segment(1, 15),)) == ()


def test_the_hashes_of_a_task_are_kept_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of prompt and answer; only the last tasks keep theirs, and they are no data."""
    monkeypatch.setattr(run, "_CHAINED", deque())
    monkeypatch.setattr(run, "_MOST_CHAINS", 2)
    tasks = [
        Task(
            index=0, node=NodeId("n"), kind="llm", site=SiteId("s"), prompt=(Segment(key, 40),),
            output_tokens=30, output_key=9,
        )
        for key in (1, 2, 3)
    ]  # fmt: skip
    before = replace(tasks[0])
    chains = [task.chain for task in tasks]
    assert chains[0] == block_hashes((Segment(1, 40), Segment(9, 30)))
    assert [task._chain is None for task in tasks] == [True, False, False]
    assert tasks[0].chain == chains[0]
    assert tasks[1]._chain is None
    assert tasks[0] == before
    assert hash(tasks[0]) == hash(before)


def test_ticks_round_up() -> None:
    """A plan never promises less time than forecast; exact multiples stay exact."""
    assert duration_to_ticks(0.0301, 0.01) == 4
    assert duration_to_ticks(0.03, 0.01) == 3
    assert duration_to_ticks(1e-6, 0.01) == 1
    assert ticks_to_seconds(3, 0.01) == pytest.approx(0.03)
    with pytest.raises(ValueError, match="duration_s"):
        duration_to_ticks(-1.0, 0.01)


FLEET = """
schema: almanac.fleet/1
name: f
workers:
  - {id: a, url: "http://127.0.0.1:1", model: m, gpu: L4, latency: 8b-l4-1-bf16,
     kv_blocks: 9, slots: 2}
  - {id: b, url: "http://127.0.0.1:2", model: m, gpu: L4,
     latency: {a: 1, b: 1, c: 1, d: 1, e: 1, f: 1}, kv_blocks: 9, slots: 2}
"""


def test_fleet_file_is_read(tmp_path: Path) -> None:
    """Named and inline latency rows, defaults and addresses."""
    path = tmp_path / "fleet.yaml"
    path.write_text(FLEET)
    fleet = load_fleet(path)
    assert [endpoint.id for endpoint in fleet.endpoints] == ["a", "b"]
    assert fleet.endpoints[0].latency == latency_rows()["8b-l4-1-bf16"]
    assert fleet.endpoints[1].scheduling == "fcfs"
    assert fleet.index_of(fleet.endpoints[1].id) == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("almanac.fleet/1", "other/1", r"fleet\.yaml: schema: 'other/1'.*write schema"),
        ("id: b", "id: a", r"workers\[1\]\.id.*used twice"),
        ("127.0.0.1:2", "127.0.0.1:1", r"workers\[1\]\.url.*already the address of 'a'"),
        ("8b-l4-1-bf16", "8b-b99", r"workers\[0\]\.latency: no latency row '8b-b99'"),
        ("slots: 2}", "slots: 0}", r"workers\[0\]\.slots: 0 is not an integer >= 1"),
        ("kv_blocks: 9, slots: 2}\n  - {id: b", "slots: 2}\n  - {id: b", r"'kv_blocks' is missing"),
        ("gpu: L4, latency: 8b", "gpus: L4, latency: 8b", r"unknown field 'gpus'"),
        ("d: 1, e", "d: -1, e", r"workers\[1\]\.latency\.d: -1 is not a number"),
        ('"http://127.0.0.1:1"', '"127.0.0.1"', r"workers\[0\]\.url.*http://host:port"),
        ("workers:", "workers: 3\nx:", r"fleet\.yaml"),
        ("name: f", "name: [", r"fleet\.yaml:\d+:\d+: not valid YAML"),
    ],
)
def test_bad_fleet_files_name_the_place_and_the_remedy(
    tmp_path: Path, old: str, new: str, message: str
) -> None:
    """Each mistake gets one error with file, field and value."""
    path = tmp_path / "fleet.yaml"
    text = FLEET.replace(old, new, 1)
    assert text != FLEET
    path.write_text(text)
    with pytest.raises(InvalidInput, match=message):
        load_fleet(path)


def test_fleet_hash_ignores_addresses_and_sees_speed(tmp_path: Path) -> None:
    """Plans stay valid when an endpoint moves to another port, not when it gets slower."""
    path = tmp_path / "fleet.yaml"

    def hash_of(text: str) -> str:
        path.write_text(text)
        return load_fleet(path).content_hash()

    assert hash_of(FLEET) == hash_of(FLEET.replace("127.0.0.1:2", "127.0.0.1:7"))
    assert hash_of(FLEET) != hash_of(FLEET.replace("d: 1, e", "d: 2, e"))


def test_bundled_files_are_valid() -> None:
    """Every fleet and workflow that comes with the project loads."""
    for path in sorted((data_dir() / "fleets").glob("*.yaml")):
        assert load_fleet(path).endpoints
    workflow = load_workflow(data_dir() / "demo" / "research.json")
    truth = load_estimates(data_dir() / "demo" / "truth.json")
    assert set(truth.workflows[workflow.content_hash].sites) == set(workflow.call_sites)


def workflow_json() -> dict[str, object]:
    raw: dict[str, object] = json.loads((data_dir() / "demo" / "research.json").read_text())
    return raw


def test_workflow_round_trip_and_loops() -> None:
    """The JSON form is canonical, and the critic loop is found."""
    workflow = Workflow.from_json(workflow_json())
    assert Workflow.from_json(workflow.to_json()) == workflow
    assert workflow.to_json() == workflow_json()
    (loop,) = workflow.loops
    assert (loop.header, loop.nodes) == ("draft", ("critic", "draft"))
    assert loop.back_edges == (("critic", "draft"),)


def test_content_hash_is_of_the_structure() -> None:
    """Names and learned probabilities leave the hash alone; an edge does not."""
    raw = workflow_json()
    base = Workflow.from_json(raw).content_hash
    raw["name"] = "other"
    for outcome, p in zip(raw["branches"][0]["outcomes"], (0.25, 0.75), strict=True):  # type: ignore[index]
        outcome["probability"] = p
    assert Workflow.from_json(raw).content_hash == base
    raw["edges"].append(["quick_answer", "outline"])  # type: ignore[attr-defined]
    assert Workflow.from_json(raw).content_hash != base


def break_workflow(what: str) -> dict[str, object]:
    raw = workflow_json()
    match what:
        case "schema":
            raw["schema"] = "x"
        case "unknown":
            raw["edges"].append(["triage", "nowhere"])  # type: ignore[attr-defined]
        case "unreachable":
            raw["nodes"].append({"id": "island", "kind": "code"})  # type: ignore[attr-defined]
            raw["edges"].append(["island", "__end__"])  # type: ignore[attr-defined]
        case "endless":
            raw["nodes"].append({"id": "trap", "kind": "code"})  # type: ignore[attr-defined]
            raw["edges"].append(["triage", "trap"])  # type: ignore[attr-defined]
        case "sum":
            for outcome in raw["branches"][0]["outcomes"]:  # type: ignore[index]
                outcome["probability"] = 0.6
        case "twice":
            raw["nodes"].append(raw["nodes"][0])  # type: ignore[attr-defined,index]
        case "need":
            raw["joins"][0]["need"] = 4  # type: ignore[index]
        case "kind":
            raw["nodes"][0]["kind"] = "oracle"  # type: ignore[index]
    return raw


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("schema", "schema: 'x'"),
        ("unknown", "edge triage -> nowhere: unknown node 'nowhere'"),
        ("unreachable", "'island': cannot be reached"),
        ("endless", "'trap': never leads to the end"),
        ("sum", "probabilities sum to 1.2"),
        ("twice", "used twice"),
        ("need", "waits for 4 of 3"),
        ("kind", r"nodes\[0\].kind: 'oracle' is unknown"),
    ],
)
def test_bad_workflows_name_the_smallest_reason(what: str, message: str) -> None:
    """Each broken rule has its own message."""
    with pytest.raises(WorkflowError, match=message):
        Workflow.from_json(break_workflow(what), where="w.json")


def test_quantiles_interpolate_and_refuse_nonsense() -> None:
    """Linear between levels, flat beyond them; NaN, disorder and negatives are refused."""
    spread = Quantiles(values=(1, 2, 3, 4, 5, 6, 7), mean=4.0)
    assert spread.at(0.5) == 4
    assert spread.at(0.375) == pytest.approx(3.5)
    assert spread.at(0.0) == 1
    assert spread.at(1.0) == 7
    for values, mean in (((1, 2, 3, 2, 5, 6, 7), 1.0), ((-1, 2, 3, 4, 5, 6, 7), 1.0)):
        with pytest.raises(InvalidInput, match="non-decreasing"):
            Quantiles(values=values, mean=mean)
    with pytest.raises(InvalidInput):
        Quantiles(values=(1.0,) * len(LEVELS), mean=math.nan)


def test_estimates_survive_the_file_and_fall_back(tmp_path: Path) -> None:
    """A table read back is equal; unknown sites and tools get the prior."""
    known = Quantiles.from_samples([1.0, 2.0, 3.0])
    table = EstimateTable(
        workflows={
            "h": WorkflowEstimate(
                sites={"a#0": SiteEstimate(output_tokens=known, prompt_tokens=known)},
                tools={"t": known},
                branches={"b": {"x": (0.5, 0.2), "y": (0.5, 0.8)}},
                remaining_s={"a": 3.0},
            )
        }
    )
    path = tmp_path / "estimates.json"
    save_estimates(table, path)
    assert load_estimates(path) == table
    assert table.site("h", "a#0").output_tokens == known
    assert table.site("h", "zzz").output_tokens.provenance == "prior"
    assert table.tool("other", "t").provenance == "prior"
    path.write_text('{"schema": "x"}')
    with pytest.raises(InvalidInput, match="almanac train"):
        load_estimates(path)


def test_trace_round_trip(tmp_path: Path) -> None:
    """Records written are the records read."""
    records = [
        CallRecord(
            run_id="r", call_id="c", workflow_hash="h", node="n", site="n#0", ready_s=0.0,
            sent_s=0.1, endpoint="e", prompt_tokens=5, output_tokens=2, finish_s=1.0,
        ),
        RunRecord(run_id="r", workflow="w", workflow_hash="h", arrival_s=0.0, finish_s=1.0),
    ]  # fmt: skip
    path = tmp_path / "t.jsonl"
    save_trace(records, path, policy="p")
    assert load_trace(path) == records
    assert json.loads(path.read_text().splitlines()[0])["policy"] == "p"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", r"t\.jsonl:2.*not valid JSON"),
        ('{"type": "walk"}', r"t\.jsonl:2.*'walk'"),
        ('{"type": "tool", "run_id": "r"}', r"t\.jsonl:2.*finish_s.*is missing"),
        ('{"type": "tool", "start_s": "soon"}', r"t\.jsonl:2: start_s.*'soon' is not a number"),
        ('{"type": "tool", "start_s": null}', r"t\.jsonl:2: start_s: None is not a number"),
        ('{"type": "tool", "start_s": NaN}', r"t\.jsonl:2: start_s: nan is not a number"),
        ('{"type": "call", "output_tokens": -4}', r"t\.jsonl:2: output_tokens: -4 is not a num"),
    ],
)
def test_bad_trace_rows_name_file_line_and_field(tmp_path: Path, line: str, message: str) -> None:
    """A malformed row says where it is and what to do."""
    path = tmp_path / "t.jsonl"
    path.write_text('{"schema": "almanac.trace/1"}\n' + line + "\n")
    with pytest.raises(InvalidInput, match=message):
        load_trace(path)


def test_a_trace_needs_its_header(tmp_path: Path) -> None:
    """A file without a header, or without anything, is refused."""
    path = tmp_path / "t.jsonl"
    for text in ("", '{"type": "run"}\n'):
        path.write_text(text)
        with pytest.raises(TraceFormatError, match="header"):
            load_trace(path)


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    """Either the whole new file or the old one; no temporary file stays behind."""
    path = tmp_path / "f.json"
    path.write_text("old")

    def fail_half_way() -> None:
        with atomic_write(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    """Missing, a folder, not text, not JSON: one clear error each."""
    with pytest.raises(InvalidInput, match="no such fleet file"):
        read_yaml(tmp_path / "absent.yaml", what="fleet file")
    with pytest.raises(InvalidInput, match="is a folder"):
        read_json(tmp_path, what="plan")
    (tmp_path / "b").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidInput, match="UTF-8"):
        read_json(tmp_path / "b", what="plan")
    (tmp_path / "j").write_text("{")
    with pytest.raises(InvalidInput, match=r"j:1:2"):
        read_json(tmp_path / "j", what="plan")
    with pytest.raises(InvalidInput, match="cannot write there"), atomic_write(Path("/proc/x/y")):
        pass
    with pytest.raises(InvalidInput, match="it is a folder"), atomic_write(tmp_path):
        pass


def test_tasks_refuse_what_cannot_happen() -> None:
    """A task cannot wait for a later one, and a call needs a site, a prompt and an answer."""
    with pytest.raises(WorkflowError, match="waits for"):
        Task(index=0, node=NodeId("n"), kind="code", preds=(0,))
    with pytest.raises(WorkflowError, match="lacks a site"):
        Task(index=0, node=NodeId("n"), kind="llm")
    with pytest.raises(WorkflowError, match="delay"):
        Task(index=0, node=NodeId("n"), kind="tool", delay_s=-1.0)


def test_fleet_errors_are_input_errors() -> None:
    """One except clause catches every mistake a user can mend."""
    assert issubclass(FleetError, InvalidInput)
    assert issubclass(InvalidInput, ValueError)
