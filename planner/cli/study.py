"""`almanac study`: named comparisons over a grid of settings, tuned, paired, resumable."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.cli.checks import at_least, out_folder
from planner.cli.compare import progress

if TYPE_CHECKING:
    from planner.study.studies import Study

__all__ = ["register", "run"]


def register(subparsers: Any) -> None:
    """Add the sub-command."""
    parser = subparsers.add_parser(
        "study",
        help="run a named study of policies over many settings",
        description="Compare policies over a grid of fleets, loads and workflow mixes on the same "
        "simulated runs. Policies with parameters are tuned on other seeds with equal budgets. "
        "Each finished simulation is kept in the output folder: a study that was interrupted goes "
        "on where it was. Writes results.json, bars.json and report.html there.",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--study", metavar="NAME", default="smoke",
        help="standard (all factors, all policies), agentir, ablation, forecasts, acceptance "
        "(what the papers claim), regimes, value (fleets x loads x KV) or smoke (two settings) "
        "(default: %(default)s)",
    )  # fmt: skip
    which.add_argument(
        "--smoke", action="store_const", const="smoke", dest="study",
        help="a short run of the whole machinery: the same as --study smoke",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="study folder (default: data/results/DATE_STUDY)")
    parser.add_argument("--seeds", type=int, help="replications (default: the study's)")
    parser.add_argument(
        "--more-seeds", type=int, metavar="N",
        help="further replications of almanac, the baseline and the best few within 2 %% of the "
        "best mean or P95 (default: the study's)",
    )  # fmt: skip
    parser.add_argument("--runs", type=int, help="runs per seed (default: the study's)")
    parser.add_argument(
        "--jobs", type=int, default=2, help="processes to simulate with (default: %(default)s)"
    )
    parser.add_argument(
        "--settings",
        metavar="GLOB,GLOB",
        help="settings to run, as in 'h02-scarce-*/0.85/*,h00-*'",
    )
    parser.add_argument(
        "--policies", metavar="A,B",
        help="policies to compare, as [label=]name[-variant][:key=value+key=value] (default: the "
        "study's, and those that its claims need)",
    )  # fmt: skip
    parser.add_argument(
        "--data", type=Path, help="folder of the public datasets, for recorded arrivals"
    )
    parser.add_argument(
        "--resume", action=argparse.BooleanOptionalAction, default=True,
        help="use the simulations that the folder already holds (default: yes)",
    )  # fmt: skip
    parser.add_argument("--list", action="store_true", help="name the settings and stop")
    parser.add_argument("--json", action="store_true", help="print the bars as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    from planner.study.contenders import contenders
    from planner.study.grid import run_bounds, run_clairvoyant, run_more, run_study
    from planner.study.outcome import document, save_document, study_table

    at_least(args, seeds=1, more_seeds=0, runs=10, jobs=1)
    study = _study(args)
    if args.list:
        for setting in study.settings:
            print(setting.name)
        return 0
    out = args.out or Path(
        "data", "results", f"{datetime.now().astimezone():%Y-%m-%d}_{study.name}"
    )
    out_folder(out, "--out")
    how: dict[str, Any] = {"jobs": args.jobs, "data": args.data, "progress": progress}
    outcomes = run_study(study, out, resume=args.resume, **how)
    if chosen := contenders(study, outcomes):
        outcomes = run_more(study, outcomes, chosen, out, resume=args.resume, **how)
    known = run_clairvoyant(study, outcomes, out, **how)
    limits = run_bounds(study, out, jobs=args.jobs, data=args.data)
    found = document(study, outcomes, known, limits)
    save_document(found, out / "results.json")
    save_document(found["bars"], out / "bars.json")
    from planner.report.study_page import write_study_page  # matplotlib is slow to load

    progress(f"wrote {write_study_page(found, out / 'report.html')}")
    print(json.dumps(found["bars"], indent=1) if args.json else study_table(found))
    return 0


def _study(args: argparse.Namespace) -> Study:
    """Return the study as the options change it."""
    from planner.study.grid import chosen_settings
    from planner.study.studies import make_study

    study = make_study(args.study)
    study = replace(study, settings=chosen_settings(study, args.settings))
    if args.policies:
        names = [part.strip().replace("+", ",") for part in args.policies.split(",")]
        study = replace(study, policies=tuple(filter(None, names)), claims=())
    # What is not said keeps its share, so that a short study is short throughout.
    if args.seeds:
        more = round(study.more_seeds * args.seeds / study.seeds)
        study = replace(study, seeds=args.seeds, more_seeds=more)
    if args.more_seeds is not None:
        study = replace(study, more_seeds=args.more_seeds)
    if args.runs:
        tuning = max(10, round(study.tuning_runs * args.runs / study.runs))
        study = replace(study, runs=args.runs, tuning_runs=tuning)
    return study
