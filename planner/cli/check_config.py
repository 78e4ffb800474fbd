"""`almanac check-config`: whether a gateway would start with a file, and with which settings."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from planner.cli.checks import addresses
from planner.cli.gateway_options import add_options, config_of
from planner.dispatch.policies import parse_policy
from planner.dispatch.table import load_table
from planner.domain.estimates import load_estimates
from planner.domain.workflow import load_workflow
from runtime.config import ServeConfig, all_settings
from runtime.settings import shown, unknown_variables

__all__ = ["check_files", "register", "run"]


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``check-config`` command."""
    parser = subparsers.add_parser(
        "check-config",
        help="check the gateway's configuration",
        description=(
            "Check everything `almanac serve` would be told by the same file, options and "
            "environment, without starting anything. A value comes from the option, else from "
            "ALMANAC_<SECTION>_<KEY>, else from the file, else from the default. Exit code 2 and "
            "one line for the first thing that is wrong."
        ),
    )
    parser.add_argument(
        "--effective",
        action="store_true",
        help="print all settings with where each came from; keys are hidden",
    )
    add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check; return 0."""
    config = config_of(args)
    check_files(config, args.file or args.config)
    for line in unknown_variables(all_settings(), os.environ):
        print(f"warning: {line}", file=sys.stderr)
    if args.effective:
        print(shown(all_settings(), config.sources), end="")
        if config.tenants:
            print(f"tenants: [{', '.join(one.tenant.name for one in config.tenants)}]  # file")
    else:
        print("ok")
    return 0


def check_files(config: ServeConfig, path: Path | None) -> None:
    """Check what the settings refer to: policy, files, addresses.

    Raises
    ------
    InvalidInput
        Naming the file, the value and the remedy.
    """
    launch = config.launch
    parse_policy(launch.policy)
    if config.fleet is not None:
        addresses(config.fleet, path or Path("workers"))
    if launch.table is not None:
        table = load_table(Path(launch.table))
        if config.fleet is not None:
            table.check_fleet(config.fleet, launch.table)
    if launch.estimates is not None:
        load_estimates(Path(launch.estimates))
    for name in launch.workflows:
        load_workflow(Path(name))
