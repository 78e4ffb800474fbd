"""The dispatch table: compiled from plans, looked up by load, saved and read back."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from planner.dispatch.rows import Ranked, Row, Rows
from planner.dispatch.table import (
    DispatchTable,
    LoadLevel,
    Tuning,
    compile_table,
    load_table,
    merge_tables,
    save_table,
)
from planner.domain.errors import InvalidInput
from planner.domain.estimates import EstimateTable
from planner.domain.fleet import Endpoint, Fleet
from planner.domain.ids import EndpointId, NodeId, SiteId
from planner.domain.latency import LatencyRow
from planner.domain.plan import Assignment, Plan
from planner.domain.workflow import END, START, CallSite, Node, Workflow

ROW = LatencyRow(
    prefill_base_ms=5,
    prefill_us_per_token=50,
    prefill_ns_per_token_sq=0,
    decode_base_ms=10,
    decode_us_per_call=100,
    decode_ns_per_kv_token=0,
)
FLEET = Fleet(
    name="two",
    endpoints=tuple(
        Endpoint(
            id=EndpointId(name),
            model="m",
            gpu="G",
            latency=ROW.scaled(f),
            kv_blocks=99,
            max_num_seqs=4,
        )
        for name, f in (("fast", 1.0), ("slow", 3.0))
    ),
)
A = NodeId("a")
WORKFLOW = Workflow(
    name="one",
    nodes=(Node(id=A, kind="llm", call_sites=(CallSite(id=SiteId("a#0")),)),),
    edges=((START, A), (A, END)),
)


def plan(fast_classes: int) -> Plan:
    return Plan(
        workflow_hash=WORKFLOW.content_hash,
        fleet_hash=FLEET.content_hash(),
        arrival_rate_rps=1.0,
        run_classes=4,
        assignments=tuple(
            Assignment(run_class=r, site="a#0", endpoint="fast" if r < fast_classes else "slow")
            for r in range(4)
        ),
        levels={"fast": 2, "slow": 1},
        objective_s=2.0,
        bound_s=1.9,
        status="feasible",
        scenarios=1,
        seed=0,
    )


def table() -> DispatchTable:
    return compile_table(
        [
            LoadLevel(occupancy=0.5, plan=plan(4), prices={"fast": 0.1}),
            LoadLevel(occupancy=2.0, plan=plan(1), prices={"fast": 2.0, "slow": 0.5}),
        ],
        WORKFLOW,
        FLEET,
        EstimateTable(),
        tuning=Tuning(price_scale=0.5, plan_pull=1.0),
    )


def test_rows_say_what_the_plan_says() -> None:
    """Shares come from the run classes; the endpoint with the largest share ranks first."""
    first, second = table().rows
    assert [(one.endpoint, one.share) for one in first.ranked] == [("fast", 1.0), ("slow", 0.0)]
    assert [(one.endpoint, one.share) for one in second.ranked] == [("slow", 0.75), ("fast", 0.25)]
    assert (first.valid_from, first.valid_to, second.valid_to) == (0.0, 0.5, 2.0)


def test_look_up_goes_by_load_and_ends_with_the_last_bucket() -> None:
    """The bucket is the first whose bound is not exceeded; beyond the last there is no row."""
    made = table()
    key = (WORKFLOW.content_hash, "a#0")
    assert made.find(*key, 0.5).row.bucket == 0  # type: ignore[union-attr]
    assert made.find(*key, 0.51).row.bucket == 1  # type: ignore[union-attr]
    assert made.find(*key, 2.1) is None
    assert made.find("other", "a#0", 0.1) is None


def test_weights_are_applied_when_compiled() -> None:
    """Imposed time counts at theta and the scaled price; the pull is by distance from the plan."""
    made = table()
    row = made.find(WORKFLOW.content_hash, "a#0", 1.0)
    assert row is not None
    assert row.theta.tolist() == [made.tuning.theta + 1.0, made.tuning.theta + 0.25]
    least_s = min(one.cost_s for one in row.row.ranked)
    assert row.pull_s == pytest.approx((least_s * (1 - 0.25 / 0.75), 0.0))


def test_save_and_load_keep_the_version(tmp_path: Path) -> None:
    """A table read back is the same table, and its version is that of its content."""
    made = table()
    path = tmp_path / "table.json"
    save_table(made, path)
    assert load_table(path) == made
    assert load_table(path).version == made.version
    raw = json.loads(path.read_text())
    raw["rows"][0]["ranked"][0]["price"] = 9.0
    path.write_text(json.dumps(raw))
    with pytest.raises(InvalidInput, match="edited by hand"):
        load_table(path)


def test_an_unbounded_last_bucket_survives_the_file(tmp_path: Path) -> None:
    """Infinity as a bound is written and read back."""
    made = compile_table(
        [LoadLevel(occupancy=math.inf, plan=plan(4), prices={})], WORKFLOW, FLEET, EstimateTable()
    )
    save_table(made, tmp_path / "t.json")
    assert load_table(tmp_path / "t.json").bounds == (math.inf,)


def test_a_table_is_refused_for_another_fleet() -> None:
    """The error names both fleets' endpoints and says what to do."""
    other = Fleet(name="other", endpoints=FLEET.endpoints[:1])
    with pytest.raises(InvalidInput, match="almanac plan"):
        table().check_fleet(other)
    table().check_fleet(FLEET)


def test_plans_of_another_workflow_are_refused() -> None:
    """compile_table checks what the plan was made for."""
    wrong = Workflow(
        name="two",
        nodes=(Node(id=NodeId("b"), kind="code"),),
        edges=((START, NodeId("b")), (NodeId("b"), END)),
    )
    with pytest.raises(InvalidInput, match="another|was made for"):
        compile_table(
            [LoadLevel(occupancy=1.0, plan=plan(4), prices={})], wrong, FLEET, EstimateTable()
        )


def test_merge_refuses_the_same_workflow_twice() -> None:
    """Rows of one workflow come from one compilation."""
    with pytest.raises(InvalidInput):
        merge_tables([table(), table()])


def test_rows_by_column_give_back_what_was_put_in() -> None:
    """Numbers of any size, reasons, order and flags of a row survive being kept by column."""
    given = tuple(
        Row(
            workflow_hash="w",
            site=site,
            bucket=0,
            valid_from=0.0,
            valid_to=math.inf,
            ranked=(
                Ranked(endpoint="b", cost_s=cost, share=share, price=1 / 3),
                Ranked(endpoint="a", cost_s=123456.7891, share=1.0 - share, price=0.0),
            ),
            priority="arrival",
            retain_kv=site == "x",
            reason=reason,
        )
        for site, cost, share, reason in (
            ("x", 0.1, 0.25, "planned for 2 runs/s; b takes 25%"),
            ("y", 2.0**-30, 1 / 64, "by hand"),
        )
    )
    rows = Rows(given, ("a", "b"))
    assert tuple(rows) == given
    assert rows[:1] == given[:1]
    assert rows == Rows(rows, ("a", "b"))
    assert rows.cost_s[0].tolist() == [123456.7891, 0.1]


def test_rows_of_planned_size_take_four_bytes_a_number() -> None:
    """Costs, shares and prices as `compile_table` rounds them need no more than 32 bits."""
    (row,) = table().rows[:1]
    rows = Rows([row], table().endpoints)
    assert {rows.cost_s.dtype, rows.share.dtype, rows.price.dtype} == {np.dtype(np.float32)}
    assert rows[0] == row


def test_a_table_spread_over_a_larger_fleet_plans_nothing_for_the_new() -> None:
    """Endpoints are found by id, in the router's order; those it does not know count nothing."""
    made = table().spread(("slow", "new", "fast"))
    found = made.find(WORKFLOW.content_hash, "a#0", 1.0)
    assert found is not None
    assert (found.theta - made.tuning.theta).tolist() == [0.25, 0.0, 1.0]
    assert found.pull_s[1] == 0.0
