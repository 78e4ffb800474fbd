"""Fleet plans: optimal, checked, reproducible, and a clear answer when there is none."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ortools.sat.python import cp_model

from planner.domain.errors import Infeasible, InvalidInput, ModelInvalid, NoSolutionFound
from planner.domain.estimates import EstimateTable, Quantiles, WorkflowEstimate
from planner.domain.files import data_dir
from planner.domain.fleet import Fleet, load_fleet
from planner.domain.ids import EndpointId, NodeId
from planner.domain.plan import Plan
from planner.domain.workflow import START, Branch, Node, Outcome, Workflow
from planner.solve import search as search_module
from planner.solve.bounds import carried_rate_rps, critical_path_cost
from planner.solve.explain import endpoint_use, runners_up
from planner.solve.heuristics import greedy_solution
from planner.solve.objective import Goal
from planner.solve.search import Stage, build_model
from planner.solve.solver import Budget, PlanResult, solve_plan
from planner.solve.timing import build_timing
from planner.solve.variables import Variables
from planner.verify import verify_plan
from tests.planner.graph.research import research_estimate, research_workflow

from .small import EXACT, Case, case, chain, endpoint, enumerate_best, fan, fleet

TICK = 0.01
UNEQUAL = (0.5, 0.6, 0.8, 1.0, 1.2, 1.6, 2.0)


def assert_verified(question: Case, result: PlanResult) -> None:
    """Assert that the independent checker accepts a plan."""
    report = verify_plan(
        result.plan, question.workflow, question.fleet, question.estimates, result.scenarios
    )
    assert report.ok, report.violations


def homes(plan: Plan) -> dict[str, set[str]]:
    """Return the endpoints of each site."""
    return {site: set(shares) for site, shares in plan.shares().items()}


def test_one_call_goes_to_the_fast_endpoint() -> None:
    """Alone, a call of 1.2 s on the fast endpoint is best placed there, at level 1."""
    question = case(chain("a"), fleet(endpoint("slow", 2.0), endpoint("fast")), rate=0.1)
    result = question.solve()
    assert homes(result.plan) == {"a#0": {"fast"}}
    assert result.plan.levels == {"fast": 1}
    assert result.plan.objective_s == pytest.approx(1.2)
    assert (result.plan.status, result.plan.gap) == ("optimal", 0.0)
    assert_verified(question, result)


def test_load_raises_the_level_before_it_reaches_a_slow_endpoint() -> None:
    """At 1 run/s level 2 (1.5 s: a step of 11 ms and one more prefill of 0.2 s) is the answer."""
    question = case(chain("a"), fleet(endpoint("slow", 2.0), endpoint("fast")), rate=1.0)
    result = question.solve()
    assert result.plan.levels == {"fast": 2}
    assert result.plan.objective_s == pytest.approx(1.5)


def test_without_room_some_classes_go_to_the_slow_endpoint() -> None:
    """With one slot each, the fast endpoint has room for 1 of 2 classes at 0.8 runs/s."""
    machines = fleet(endpoint("slow", 1.5, slots=1), endpoint("fast", slots=1))
    question = case(chain("a"), machines, rate=0.8, classes=2)
    result = question.solve()
    assert result.plan.shares() == {"a#0": {"fast": 0.5, "slow": 0.5}}
    assert result.plan.objective_s == pytest.approx((1.2 + 1.8) / 2)
    assert_verified(question, result)


def test_long_branch_of_a_fan_out_gets_the_fast_slot() -> None:
    """Of two calls side by side, the longer one decides: it takes the scarce fast endpoint."""
    machines = fleet(endpoint("slow", 2.0, slots=1), endpoint("fast", slots=1))
    question = case(fan("a", "x", "y", "z"), machines, 0.18, outputs=(20, 300, 60, 20))
    result = question.solve()
    assert homes(result.plan)["x#0"] == {"fast"}
    assert homes(result.plan)["y#0"] == {"slow"}
    assert result.plan.objective_s == pytest.approx(0.4 + 3.2 + 0.4)


def test_model_restricts_the_endpoints() -> None:
    """A call for model m never goes to a faster endpoint of another model."""
    question = case(chain("a"), fleet(endpoint("m1", 3.0), endpoint("other", model="x")), 0.1)
    assert homes(question.solve().plan) == {"a#0": {"m1"}}


QUESTIONS = st.builds(
    lambda shape, machines, rate, outputs, classes: case(
        shape(*"abcde"[: len(outputs)]),
        fleet(*(endpoint(f"e{n}", *one) for n, one in enumerate(machines))),
        rate,
        outputs=outputs,
        classes=classes if len(outputs) < 4 else 1,
        spread=UNEQUAL,
    ),
    shape=st.sampled_from((chain, fan)),
    machines=st.lists(
        st.tuples(st.sampled_from((1.0, 1.3, 2.0, 3.0)), st.sampled_from((1, 2, 4))),
        min_size=2,
        max_size=2,
    ),
    rate=st.floats(0.05, 0.7),
    outputs=st.lists(st.integers(20, 250), min_size=3, max_size=5),
    classes=st.integers(1, 2),
)


@settings(max_examples=40, deadline=None)
@given(question=QUESTIONS)
def test_enumeration_confirms_optimum_and_infeasibility(question: Case) -> None:
    """Up to five calls, the solver's optimum is the enumerated one, and so is infeasibility."""
    best = enumerate_best(question)
    try:
        result = question.solve()
    except Infeasible:
        # Loads are rounded up by at most 1e-5 busy calls each: look just above the rate.
        assert best is None or enumerate_best(replace(question, rate=question.rate * 1.001)) is None
        return
    assert best is not None
    assert result.plan.status == "optimal"
    rounding = TICK * max(len(run.tasks) for run in result.scenarios)
    assert best - 1e-9 <= result.plan.objective_s <= best + rounding
    assert_verified(question, result)


@settings(max_examples=15, deadline=None)
@given(question=QUESTIONS, scale=st.sampled_from((0.7, 1.0, 2.5)))
def test_more_endpoints_never_hurt(question: Case, scale: float) -> None:
    """With one endpoint more, the optimum is at most as large, and no load becomes too much."""
    try:
        before = question.solve().plan.objective_s
    except Infeasible:
        return
    more = fleet(*question.fleet.endpoints, endpoint("more", scale))
    assert replace(question, fleet=more).solve().plan.objective_s <= before + 1e-9


@settings(max_examples=15, deadline=None)
@given(question=QUESTIONS)
def test_greedy_plan_is_valid_and_never_beats_the_bound(question: Case) -> None:
    """The greedy plan passes the checker and lies between the bounds and CP-SAT's hands."""
    instance = question.instance()
    timing = build_timing(instance)
    goal = Goal(instance)
    greedy = greedy_solution(instance, timing, goal)
    if greedy is None:
        return
    result = question.solve()
    assert goal.seconds(greedy.cost) >= result.plan.bound_s - 1e-9
    assert greedy.cost >= result.solution.cost
    assert greedy.cost >= critical_path_cost(instance, timing, goal)
    alone = question.solve(Budget(wall_s=1e-9))
    assert_verified(question, alone)


@settings(max_examples=10, deadline=None)
@given(question=QUESTIONS)
def test_scaling_all_times_scales_the_optimum(question: Case) -> None:
    """Twice slower endpoints at half the rate give twice the latency, up to rounding."""
    try:
        before = question.solve().plan.objective_s
    except Infeasible:
        return
    slower = fleet(*(replace(e, latency=e.latency.scaled(2.0)) for e in question.fleet.endpoints))
    after = replace(question, fleet=slower, rate=question.rate / 2).solve().plan.objective_s
    # Half a rate unit may tip a load that fills its room to the last digit: allow no more.
    assert after == pytest.approx(2 * before, abs=2 * TICK * 6)


@settings(max_examples=10, deadline=None)
@given(question=QUESTIONS)
def test_renaming_and_reordering_endpoints_changes_nothing(question: Case) -> None:
    """Ids and order of endpoints leave the optimum as it was."""
    try:
        before = question.solve().plan.objective_s
    except Infeasible:
        return
    renamed = [
        replace(e, id=EndpointId(f"other-{e.id}")) for e in reversed(question.fleet.endpoints)
    ]
    after = replace(question, fleet=fleet(*renamed)).solve().plan.objective_s
    assert after == pytest.approx(before)


def test_renaming_nodes_changes_nothing() -> None:
    """With constant forecasts, node names leave the optimum as it was."""
    machines = fleet(endpoint("e", slots=1), endpoint("f", 2.0))
    outputs = (20, 200, 60, 40)
    one = case(fan("a", "b", "c", "d"), machines, 0.2, outputs).solve().plan
    two = case(fan("k", "z", "q", "b"), machines, 0.2, outputs).solve().plan
    assert one.objective_s == pytest.approx(two.objective_s)


def test_a_branch_of_probability_zero_changes_nothing() -> None:
    """An outcome that is never taken leaves the plan's objective as it was."""
    machines = fleet(endpoint("e"), endpoint("f", 2.0))
    plain = chain("a", "b")
    question = case(plain, machines, 0.3)
    more = Workflow(
        name="more",
        nodes=(*plain.nodes, Node(id=NodeId("never"), kind="tool")),
        edges=((START, NodeId("a")),),
        branches=(
            Branch(
                id="x",
                source=NodeId("a"),
                outcomes=(
                    Outcome(id="go", targets=(NodeId("b"),), probability=1.0),
                    Outcome(id="no", targets=(NodeId("never"),), probability=0.0),
                ),
            ),
            Branch(id="y", source=NodeId("never"), outcomes=(Outcome(id="end", targets=()),)),
            Branch(id="z", source=NodeId("b"), outcomes=(Outcome(id="end", targets=()),)),
        ),
    )
    sites = question.estimates.workflows[plain.content_hash].sites
    table = EstimateTable(workflows={more.content_hash: WorkflowEstimate(sites=sites)})
    other = replace(question, workflow=more, estimates=table)
    assert other.solve().plan.objective_s == pytest.approx(question.solve().plan.objective_s)


def test_symmetry_breaking_and_least_levels_leave_the_optimum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without the redundant constraint families the optimum is the same."""
    machines = fleet(endpoint("e", slots=2), endpoint("f", slots=2), endpoint("g", 2.0))
    question = case(fan("a", "b", "c", "d"), machines, 0.5, (50, 150, 100, 80), classes=2)
    with_all = question.solve().plan
    assert question.instance().twins == ((0, 1),)
    for family in ("class_symmetry", "twin_symmetry", "least_level"):
        monkeypatch.setattr(f"planner.solve.constraints.{family}", lambda model, v: None)
    assert question.solve().plan.objective_s == pytest.approx(with_all.objective_s)


def research_on_the_demo_fleet() -> tuple[Workflow, EstimateTable, Fleet]:
    workflow = research_workflow()
    table = EstimateTable(workflows={workflow.content_hash: research_estimate()})
    return workflow, table, load_fleet(data_dir() / "fleets" / "demo.yaml")


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.6])
def test_research_workflow_on_the_demo_fleet(rate: float) -> None:
    """Nine call sites, five endpoints, four classes: a checked plan within 5 % of the bound."""
    workflow, table, machines = research_on_the_demo_fleet()
    budget = Budget.reproducible(relative_gap=0.05)
    result = solve_plan(workflow, machines, table, arrival_rate_rps=rate, budget=budget)
    report = verify_plan(result.plan, workflow, machines, table, result.scenarios)
    assert report.ok, report.violations
    assert result.plan.gap <= 0.05
    objectives = [row.objective_s for row in result.log]
    assert objectives == sorted(objectives, reverse=True)


def test_a_reproducible_budget_gives_the_same_plan_again() -> None:
    """Where the search has to improve on the hint, the same question has the same answer."""
    workflow, table, machines = research_on_the_demo_fleet()
    budget = Budget.reproducible(relative_gap=0.1)
    first, second = (
        solve_plan(workflow, machines, table, arrival_rate_rps=0.7, budget=budget) for _ in range(2)
    )
    assert len(first.log) > 2
    assert first.plan == second.plan


def test_the_model_is_valid() -> None:
    """CP-SAT finds nothing to object to in the model."""
    instance = case(fan("a", "b", "c", "d"), fleet(endpoint("e"), endpoint("f")), 0.3).instance()
    timing = build_timing(instance)
    model, _ = build_model(instance, timing, Stage(goal=Goal(instance)), 0)
    assert model.validate() == ""


def test_too_much_load_names_what_is_asked_and_what_is_carried() -> None:
    """One slot at 1.2 s per run carries 0.8 / 1.2 runs/s; the error says so."""
    question = case(chain("a"), fleet(endpoint("e", slots=1)), rate=0.7)
    assert carried_rate_rps(question.instance()) == pytest.approx(0.8 / 1.2)
    with pytest.raises(Infeasible, match=r"asks for 0\.7 .* at most 0\.6667"):
        question.solve()


def test_too_coarse_classes_are_told_from_too_much_load() -> None:
    """One class cannot be split over two endpoints of one slot; two classes can."""
    machines = fleet(endpoint("e", slots=1), endpoint("f", slots=1))
    whole = case(chain("a"), machines, rate=1.0)
    with pytest.raises(Infeasible, match="use more classes"):
        whole.solve()
    assert replace(whole, classes=2).solve().plan.objective_s == pytest.approx(1.2)


def test_call_that_fits_no_endpoint_is_named() -> None:
    """The error names the site and the context or the model that is missing."""
    small = case(chain("a"), fleet(endpoint("e", kv_blocks=20)), rate=0.1)
    with pytest.raises(Infeasible, match=r"'a#0' needs 400 tokens .* 'e', holds 320"):
        small.solve()
    other = case(chain("a"), fleet(endpoint("e", model="x")), rate=0.1)
    with pytest.raises(Infeasible, match="asks for model 'm'; .* serves x"):
        other.solve()


def test_scarce_kv_lowers_the_top_level() -> None:
    """With 900 tokens of KV only two calls of 350 fit side by side."""
    question = case(chain("a"), fleet(endpoint("e", kv_blocks=56)), rate=1.0)
    assert question.instance().levels == ((1, 2),)
    assert_verified(question, question.solve())


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), float("inf")])
def test_bad_rate_is_refused(rate: float) -> None:
    """A rate that is not a positive number is bad input."""
    with pytest.raises(InvalidInput, match="arrival rate"):
        case(chain("a"), fleet(endpoint("e")), rate).solve()


def test_bad_counts_and_budgets_are_refused() -> None:
    """No class, no scenario, no limit, no worker: each is bad input."""
    question = case(chain("a"), fleet(endpoint("e")), 0.1)
    for broken in (replace(question, classes=0), replace(question, samples=0)):
        with pytest.raises(InvalidInput):
            broken.solve()
    for limits in ({"wall_s": None}, {"wall_s": 0.0}, {"workers": 0}, {"relative_gap": -1.0}):
        with pytest.raises(InvalidInput, match="budget"):
            Budget(**limits)  # type: ignore[arg-type]


def test_workflow_without_calls_is_refused() -> None:
    """A workflow of tools alone has nothing to place."""
    tool = Workflow(
        name="t", nodes=(Node(id=NodeId("t"), kind="tool"),), edges=((START, NodeId("t")),),
        branches=(Branch(id="x", source=NodeId("t"), outcomes=(Outcome(id="e", targets=()),)),),
    )  # fmt: skip
    question = Case(
        tool,
        fleet(endpoint("e")),
        EstimateTable(workflows={tool.content_hash: WorkflowEstimate()}),
        0.1,
    )
    with pytest.raises(InvalidInput, match="no call site"):
        question.solve()


def test_site_that_no_scenario_visits_still_gets_an_endpoint() -> None:
    """A plan covers every call site, also one with probability zero."""
    workflow, estimate = research_workflow(), research_estimate()
    never = {"quick": (0.0,), "deep": (1.0,)}
    estimate = replace(estimate, branches={**estimate.branches, "route": never})
    table = EstimateTable(workflows={workflow.content_hash: estimate})
    question = Case(workflow, fleet(endpoint("e"), endpoint("f", 2.0)), table, 0.001)
    question = replace(
        question,
        workflow=workflow,
        fleet=fleet(*(replace(e, model="any") for e in question.fleet.endpoints)),
    )
    result = question.solve()
    assert "quick#0" in result.plan.shares()
    assert_verified(question, result)


def test_a_spent_budget_gives_the_greedy_plan_or_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Status UNKNOWN: the greedy plan with a bound below it, else `NoSolutionFound`."""
    machines = fleet(endpoint("e", slots=1), endpoint("f", 2.0))
    question = case(fan("a", "b", "c", "d"), machines, 0.3, (20, 99, 60, 40), classes=3)
    result = question.solve(Budget(wall_s=1e-9))
    assert result.plan.objective_s == pytest.approx(result.plan.notes["greedy_objective_s"])
    assert 0 < result.plan.bound_s <= result.plan.objective_s
    assert_verified(question, result)
    monkeypatch.setattr(search_module, "first_plan", lambda *_: None)
    with pytest.raises(NoSolutionFound, match="raise the time limit"):
        question.solve(Budget(wall_s=1e-9))
    assert question.solve().plan.status == "optimal"


def test_an_invalid_model_raises_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Status MODEL_INVALID raises `ModelInvalid` with what the solver says."""

    def too_large(model: cp_model.CpModel, v: Variables, *, whole: bool) -> None:
        model.new_int_var(0, 2**62, "big")

    monkeypatch.setattr(search_module, "add_constraints", too_large)
    machines = fleet(endpoint("e", slots=1), endpoint("f", 2.0))
    question = case(fan("a", "b", "c", "d"), machines, 0.3, (20, 99, 60, 40), classes=3)
    with pytest.raises(ModelInvalid, match="domain do not fall"):
        question.solve()


def test_tool_delays_count_and_hide_what_runs_beside_them() -> None:
    """A tool of 5 s beside a call of 1.2 s leaves the call no say: a - max(5, b) - c."""
    plain = fan("a", "b", "c")
    tool = Node(id=NodeId("tool"), kind="tool")
    workflow = replace(
        plain,
        nodes=(*plain.nodes, tool),
        edges=(*plain.edges, (NodeId("a"), tool.id), (tool.id, NodeId("c"))),
    )
    question = case(plain, fleet(endpoint("e"), endpoint("f", 2.0)), 0.05)
    sites = question.estimates.workflows[plain.content_hash].sites
    estimate = WorkflowEstimate(sites=sites, tools={"tool": Quantiles.constant(5.0)})
    table = EstimateTable(workflows={workflow.content_hash: estimate})
    result = replace(question, workflow=workflow, estimates=table).solve()
    assert result.plan.objective_s == pytest.approx(1.2 + 5.0 + 1.2)


def test_explanation_names_full_endpoints_and_runners_up() -> None:
    """A full endpoint is binding; the runner-up of its call costs the difference in speed."""
    machines = fleet(endpoint("slow", 1.5, slots=1), endpoint("fast", slots=1))
    result = case(chain("a"), machines, rate=0.66).solve()
    (use,) = endpoint_use(result)
    assert (use.endpoint, use.level, use.binding) == ("fast", 1, True)
    assert use.busy == pytest.approx(0.66 * 1.2, abs=1e-4)
    (row,) = runners_up(result)
    assert (row.site, row.endpoint, row.runner_up) == ("a#0", "fast", "slow")
    assert row.extra_s == pytest.approx(0.6)
    assert not row.fits
    alone = case(chain("a"), fleet(endpoint("e")), 0.1).solve()
    assert runners_up(alone)[0].runner_up is None


def test_exact_budget_is_reproducible() -> None:
    """The budget of the tests is a deterministic one."""
    assert EXACT.workers == 1
    assert EXACT.wall_s is None
