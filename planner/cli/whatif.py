"""`almanac whatif`: what to expect of a fleet, and of the same after changes."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.cli.checks import at_least, out_folder
from planner.cli.compare import progress
from planner.domain.errors import InvalidInput
from planner.domain.files import atomic_write

if TYPE_CHECKING:
    from planner.whatif.effort import Effort
    from planner.whatif.question import Question, Target
    from planner.whatif.store import Store

__all__ = ["register", "run"]


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``whatif`` command."""
    parser = subparsers.add_parser(
        "whatif",
        help="say what to expect of a fleet, and of the same after changes",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=_DESCRIPTION,
    )
    parser.add_argument(
        "fleet", type=Path, nargs="?", metavar="FLEET", help="fleet file (YAML); not with --demo"
    )
    parser.add_argument(
        "--workflow", type=Path, action="append", default=[], metavar="FILE",
        help="workflow graph (JSON); several arrive together",
    )  # fmt: skip
    parser.add_argument(
        "--estimates", type=Path, metavar="FILE",
        help="forecasts (JSON) made by `almanac train`; runs are drawn from them, too",
    )  # fmt: skip
    parser.add_argument(
        "--truth", type=Path, metavar="FILE",
        help="distributions that runs are drawn from instead (an estimates file)",
    )  # fmt: skip
    parser.add_argument(
        "--rate", type=float, action="append", default=[], metavar="RPS",
        help="runs per second; one for each --workflow, in the same order",
    )  # fmt: skip
    parser.add_argument(
        "--tenant", action="append", default=[], metavar="NAME",
        help="whose runs they are; one for each --workflow (default: default)",
    )  # fmt: skip
    parser.add_argument(
        "--deadline", type=float, action="append", default=[], metavar="S",
        help="seconds a run may take; one for all workflows, or one for each",
    )  # fmt: skip
    parser.add_argument(
        "--policy", default="marginal_cost", metavar="NAME",
        help="who decides, as name or name:key=value+key=value (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--burst-cv", type=float, default=1.0,
        help="variation of the gaps between arrivals (default: %(default)s, Poisson)",
    )  # fmt: skip
    parser.add_argument(
        "--change", action="append", default=[], metavar="CHANGE",
        help="what to change, see above; may be repeated, each on its own",
    )  # fmt: skip
    parser.add_argument(
        "--target", metavar="METRIC=VALUE",
        help="p95=8 (mean, p50, p95 or p99 in seconds) or attainment=0.95",
    )  # fmt: skip
    parser.add_argument(
        "--grid", type=Path, metavar="FILE",
        help="a grid of changes, loads and policies (YAML); makes one table and picture",
    )  # fmt: skip
    parser.add_argument(
        "--why-not", action="store_true",
        help="look for the smallest sets of changes that meet --target; --change names those to "
        "combine (default: endpoints, load, tenants and deadlines)",
    )  # fmt: skip
    parser.add_argument(
        "--cheapest", action="store_true",
        help="look for the cheapest fleet of these kinds of endpoints that meets --target",
    )  # fmt: skip
    parser.add_argument(
        "--prices", action="store_true",
        help="what one more endpoint of each kind, slot, GB of KV and second of deadline is worth",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=int,
        help="replications, at least 2 (default: 6; grid 3; why-not 4)",
    )  # fmt: skip
    parser.add_argument(
        "--runs", type=int, help="runs of each, warm-up included (default: 150; grid 100)"
    )
    parser.add_argument(
        "--level", type=float, default=0.95, help="coverage of intervals (default: %(default)s)"
    )
    parser.add_argument(
        "--no-bounds", action="store_true", help="leave out what no policy could beat"
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER",
        help="keep results there (an interrupted run goes on where it was) and write "
        "whatif.json, and of a grid grid.csv, grid.png and report.html",
    )  # fmt: skip
    parser.add_argument(
        "--demo", action="store_true",
        help="ask about the demo fleet, with example prices; without a question of yours "
        "(--change, --target, --grid, --why-not, --prices), measure what-if against its bars",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(run=run)


_DESCRIPTION = """\
Simulate a load on a fleet and say what to expect: mean, P50, P95, P99 and deadline attainment
with intervals, cost, and what no policy whatever could beat on the same runs. Changes are
simulated with the same runs, so that small effects show. A CHANGE is one of

  +2xh100            two more endpoints like the fleet's H100s, or from the bundled tables
  -e3  -2xl4         endpoint e3 leaves; two of this GPU do (write --change=-e3, or 'remove e3')
  gpu e1=h200        another GPU; gpu *=h200 for all
  model OLD=NEW      another model, in the fleet and in the workflows that ask for it
  load 1.2           all arrival rates times 1.2
  tenant heavy=0     the rates of one tenant times a number
  deadline 20        deadlines of 20 s; +2 relaxes them, heavy=+2 those of one tenant
  retention on|off   pin idle KV, or drop it; lru leaves it to the engine; pin:60; offload
  split 2p3d         two endpoints prefill and three decode; split off
  slots e1=+4        calls side by side; kv e1=+2 is KV cache in GB
  policy NAME        who decides

Commas join changes that are made together: --change '+1xh100, -l4, load 1.5'.
"""


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    at_least(args, jobs=1, seeds=2, runs=20, burst_cv=1e-9)
    out_folder(args.out, "--out")
    _check(args)
    from planner.whatif.store import Store

    store = Store(folder=None if args.out is None else args.out / "kept", jobs=args.jobs,
                  progress=progress)  # fmt: skip
    asked = (args.change, args.target, args.grid, args.why_not, args.prices)
    if args.demo and not any(asked):
        return _bars(args)
    document, text = _answer(args, _question(args), store)
    if args.out is not None:
        _write(args.out / "whatif.json", json.dumps(document, indent=1) + "\n")
    print(json.dumps(document) if args.json else text)
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.demo == (args.fleet is not None):
        raise InvalidInput(
            "a fleet file and --demo" if args.demo else "no fleet file",
            where="whatif",
            remedy="give either FLEET or --demo",
        )
    if args.fleet is not None and not (args.workflow and args.rate):
        raise InvalidInput(
            "no work", where="whatif", remedy="give --workflow FILE --estimates FILE --rate RPS"
        )
    if args.demo and args.workflow:
        raise InvalidInput(
            "--demo has its own workflow", where="--workflow", remedy="leave one of them out"
        )
    modes = [name for name in ("grid", "why_not", "cheapest", "prices") if getattr(args, name)]
    if len(modes) > 1:
        raise InvalidInput(
            "several at once", where=", ".join(f"--{one.replace('_', '-')}" for one in modes),
            remedy="ask one after the other",
        )  # fmt: skip
    for name in ("why_not", "cheapest"):
        if getattr(args, name) and not args.target:
            option = f"--{name.replace('_', '-')}"
            raise InvalidInput("no --target", where=option, remedy="give one, as in p95=8")
    if args.change and (args.grid or args.prices or args.cheapest):
        raise InvalidInput(
            "--change has no meaning here", where="--change", remedy="put changes into the grid"
        )


def _question(args: argparse.Namespace) -> Question:
    from planner.whatif.demo import demo_question
    from planner.whatif.facade import question

    if args.demo:
        return demo_question(*args.rate[:1], deadline_s=(args.deadline or [20.0])[0])
    return question(
        args.fleet,
        args.workflow,
        args.estimates,
        rate=args.rate,
        tenant=args.tenant,
        deadline_s=args.deadline or None,
        truth=args.truth,
        policy=args.policy.replace("+", ","),
        burst_cv=args.burst_cv,
    )


def _answer(
    args: argparse.Namespace, question: Question, store: Store
) -> tuple[Mapping[str, Any], str]:
    from planner.whatif.cheapest import cheapest_fleet
    from planner.whatif.grid import load_grid, run_grid
    from planner.whatif.notation import parse_scenario
    from planner.whatif.prices import marginal_values
    from planner.whatif.question import Target
    from planner.whatif.scenarios import what_if
    from planner.whatif.whynot import why_not

    target = Target.parse(args.target) if args.target else None
    scenarios = [parse_scenario(one) for one in args.change]
    if args.grid:
        grid = load_grid(args.grid)
        result = run_grid(
            question, grid, target=target, effort=_effort(args, 3, 100, target), store=store
        )
        document = result.to_json()
        if args.out is not None:
            _write_grid(args.out, document, result.to_csv())
        return document, result.text()
    if args.why_not:
        assert target is not None  # noqa: S101 - checked above
        changes = [change for one in scenarios for change in one.changes] or None
        reasons = why_not(
            question, target, changes=changes, effort=_effort(args, 4, 120, target), store=store
        )
        return reasons.to_json(), reasons.text()
    if args.cheapest:
        assert target is not None  # noqa: S101 - checked above
        fleet = cheapest_fleet(question, target, effort=_effort(args, 4, 120, target), store=store)
        return fleet.to_json(), fleet.text()
    if args.prices:
        prices = marginal_values(question, effort=_effort(args, 6, 150, target), store=store)
        return prices.to_json(), prices.text()
    found = what_if(
        question, scenarios, target=target, effort=_effort(args, 6, 150, target), store=store
    )
    return found.to_json(), found.text()


def _effort(args: argparse.Namespace, seeds: int, runs: int, target: Target | None) -> Effort:
    from planner.whatif.effort import Effort, bounded

    effort = Effort(seeds=args.seeds or seeds, runs=args.runs or runs, level=args.level)
    if args.no_bounds:
        return Effort(seeds=effort.seeds, runs=effort.runs, level=effort.level, bounds=())
    return bounded(effort, target)


def _bars(args: argparse.Namespace) -> int:
    from planner.whatif.bars import bars_json, bars_table, measure_bars

    bars = measure_bars(args.jobs, time.perf_counter, progress)
    document = bars_json(bars)
    if args.out is not None:
        _write(args.out / "bars.json", json.dumps(document, indent=1) + "\n")
    print(json.dumps(document) if args.json else bars_table(bars))
    return 0


def _write_grid(folder: Path, document: Mapping[str, Any], rows: str) -> None:
    from planner.report.drawing import to_png
    from planner.report.whatif_page import grid_figure, write_grid_page

    _write(folder / "grid.csv", rows)
    with atomic_write(folder / "grid.png") as temporary:
        temporary.write_bytes(to_png(grid_figure(document)))
    progress(f"wrote {write_grid_page(document, folder / 'report.html')}")


def _write(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
