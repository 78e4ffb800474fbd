"""The estimate table says what traces say, and what the graph declares where they are silent."""

from dataclasses import replace

import numpy as np
import pytest

from models.importers.own import read_own_traces
from models.output_length import shrunk_quantiles
from models.snapshot import estimate_table
from planner.domain.estimates import PRIOR_OUTPUT, PRIOR_TOOL, EstimateTable
from planner.domain.trace import CallRecord, ToolRecord, save_trace
from planner.domain.workflow import Branch, CallSite, Node, Outcome, Workflow

HASH = "0123456789abcdef"


@pytest.fixture
def own(trace_folder):
    """Read the traces of the synthetic workflow."""
    return read_own_traces(sorted(trace_folder.glob("*.jsonl")))


def test_sites_tools_and_branches_follow_the_trace(own, make_records):
    """Medians of lengths and delays come close to the sample's; branch chances fall by visit."""
    estimate = estimate_table(own, {}, {}).workflows[HASH]
    assert estimate.name == "demo"
    records = make_records()
    draft = [r.output_tokens for r in records if isinstance(r, CallRecord) and r.node == "draft"]
    assert estimate.sites["draft#0"].output_tokens.at(0.5) == pytest.approx(
        np.median(draft), rel=0.1
    )
    delays = [r.finish_s - r.start_s for r in records if isinstance(r, ToolRecord)]
    assert estimate.tools["lookup"].at(0.5) == pytest.approx(np.median(delays), rel=0.1)
    again = estimate.branches["review?"]["again"]
    assert again[0] == pytest.approx(0.6, abs=0.15)
    assert again[1] == pytest.approx(0.1, abs=0.15)
    for visit in range(len(again)):
        assert sum(values[visit] for values in estimate.branches["review?"].values()) == (
            pytest.approx(1.0)
        )


def test_delays_that_grow_late_widen_their_promise(tmp_path, make_records):
    """Tool delays carry the conformal offset of later runs: three times slower ones raise it."""
    save_trace(make_records(runs=200), tmp_path / "t.jsonl")
    own = read_own_traces([tmp_path / "t.jsonl"])
    late = own.tools["held_out"].astype(bool)
    spent = own.tools["finish_s"] - own.tools["start_s"]
    slower = own.tools["finish_s"] + 2 * late * spent
    changed = replace(own, tools=own.tools.assign(finish_s=slower))
    before, after = (
        estimate_table(one, {}, {}).workflows[HASH].tools["lookup"] for one in (own, changed)
    )
    assert after.at(0.9) > 2 * before.at(0.9)
    assert np.mean((slower - own.tools["start_s"])[late] <= after.at(0.9)) >= 0.88


def test_growing_and_fresh_prompts_are_told_apart(own):
    """A site that appends to its prompt has growth tokens; one that starts afresh has none."""
    sites = estimate_table(own, {}, {}).workflows[HASH].sites
    assert 20 <= sites["draft#0"].growth_tokens.at(0.5) <= 60
    assert sites["review#0"].growth_tokens is None
    assert 300 <= sites["draft#0"].prompt_tokens.mean <= 600


def test_remaining_time_falls_along_the_run(own):
    """Expected time to the end is longer from the first node than from the last."""
    remaining = estimate_table(own, {}, {}).workflows[HASH].remaining_s
    assert set(remaining) == {"draft", "lookup", "review"}
    assert remaining["draft"] > remaining["lookup"] > remaining["review"] > 0


def test_the_graph_fills_in_what_was_not_seen(own):
    """Unseen sites take the declared hint; unseen outcomes stay possible; prefixes are kept."""
    graph = Workflow(
        name="shop",
        nodes=(
            Node(
                id="draft",
                kind="llm",
                call_sites=(
                    CallSite(id="draft#0", static_prefix_tokens=77, expected_output_tokens=50.0),
                ),
            ),
            Node(id="wait", kind="tool", expected_delay_s=4.0),
        ),
        edges=(("__start__", "draft"), ("wait", "__end__")),
        branches=(
            Branch(
                id="ok?",
                source="draft",
                outcomes=(
                    Outcome(id="yes", targets=(), probability=0.8),
                    Outcome(id="no", targets=("wait",), probability=0.2),
                ),
            ),
        ),
    )
    estimate = estimate_table(own, {graph.content_hash: graph}, {}).workflows[graph.content_hash]
    site = estimate.sites["draft#0"]
    assert site.output_tokens.mean == 50.0
    assert site.output_tokens.provenance == "declared"
    assert site.shared_prefix_tokens == 77
    assert estimate.tools["wait"].at(0.5) == 4.0
    assert estimate.branches["ok?"]["yes"] == pytest.approx((0.8,))


def test_the_table_round_trips_and_its_version_is_its_content(own):
    """JSON gives back the same table; the same traces give the same version."""
    table = estimate_table(own, {}, {})
    assert EstimateTable.from_json(table.to_json()) == table
    assert estimate_table(own, {}, {}).version == table.version


def test_shared_prefix_is_read_from_cache_hits(tmp_path, make_records):
    """Where hits are reported and no prefix is declared, their low end is the shared prefix."""
    records = []
    for one in make_records():
        if isinstance(one, CallRecord) and one.node == "review":
            values = {name: getattr(one, name) for name in CallRecord.__dataclass_fields__}
            one = CallRecord(**{**values, "cached_tokens": 160})
        records.append(one)
    save_trace(records, tmp_path / "t.jsonl")
    sites = estimate_table(read_own_traces([tmp_path / "t.jsonl"]), {}, {}).workflows[HASH].sites
    assert sites["review#0"].shared_prefix_tokens == 160
    assert sites["draft#0"].shared_prefix_tokens == 0


def test_shrinkage_starts_at_the_prior():
    """No sample gives the prior; one value moves it a little; many replace it."""
    assert shrunk_quantiles([], PRIOR_OUTPUT, 5) is PRIOR_OUTPUT
    one = shrunk_quantiles([2.0], PRIOR_TOOL, 5)
    assert PRIOR_TOOL.at(0.5) < one.at(0.5) < 2.0
    many = shrunk_quantiles([2.0] * 1000, PRIOR_TOOL, 5)
    assert many.at(0.5) == pytest.approx(2.0, rel=0.01)
    assert many.provenance == "learned"
