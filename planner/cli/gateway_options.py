"""The options of the gateway, made from its settings; shared by `serve` and `check-config`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from planner.domain.errors import InvalidInput
from runtime.config import ServeConfig, all_settings, load_config
from runtime.settings import Setting

__all__ = ["add_options", "config_of", "flags_of"]

_SECTIONS: Mapping[str, str] = {
    "server": "where it listens, and its process",
    "tls": "HTTPS",
    "policy": "how calls are placed",
    "limits": "how much may be asked for at a time",
    "faults": "what to do about endpoints that fail",
    "hints": "what clients say of their calls",
    "identity": "how calls are told apart",
    "telemetry": "what is measured and written",
}
_METAVARS = {float: "X", int: "N", str: "TEXT", tuple: "A,B"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the file and an option for each setting.

    Options keep their text: `config_of` checks every source of a value in the same way.
    """
    parser.add_argument(
        "file",
        type=Path,
        nargs="?",
        metavar="FILE",
        help="fleet file (YAML) with a url for each worker, and settings by section",
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="the same")
    parser.add_argument(
        "--worker-urls",
        nargs="+",
        metavar="URL",
        help="endpoints by address alone, instead of a file with workers; they are asked for "
        "model, context length and KV size, and their speed is learned",
    )
    groups = {
        section: parser.add_argument_group(f"{section}: {title}")
        for section, title in _SECTIONS.items()
    }
    for one in all_settings():
        _add_option(groups[one.section], one)


def _add_option(group: argparse._ArgumentGroup, one: Setting) -> None:
    text = f"{one.help}{_default(one)}".replace("%", "%%")
    if one.kind is bool:
        group.add_argument(
            *one.flags, action=argparse.BooleanOptionalAction, dest=one.path, help=text
        )
    elif one.kind is tuple:
        group.add_argument(
            *one.flags, action="append", metavar=_METAVARS[tuple], dest=one.path, help=text
        )
    else:
        metavar = "{" + ",".join(one.choices) + "}" if one.choices else _METAVARS[one.kind]
        group.add_argument(*one.flags, metavar=metavar, dest=one.path, help=text)


def _default(one: Setting) -> str:
    if one.default is None or one.default == ():
        return ""
    if one.kind is bool:
        return f" (default: {'on' if one.default else 'off'})"
    if one.kind is tuple:
        return f" (default: {','.join(one.default)})"
    return f" (default: {one.default:g})" if one.kind is float else f" (default: {one.default})"


def flags_of(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options that were given, by path of the setting."""
    given = {one.path: getattr(args, one.path) for one in all_settings()}
    return {path: value for path, value in given.items() if value is not None}


def config_of(args: argparse.Namespace) -> ServeConfig:
    """Return everything that was said about the gateway, checked.

    Raises
    ------
    InvalidInput
        Naming file, option or variable, the value and the remedy.
    """
    if args.file is not None and args.config is not None:
        raise InvalidInput(
            f"{args.file} and {args.config}", where="--config", remedy="name one file"
        )
    path = args.file or args.config
    config = load_config(path, flags=flags_of(args), environment=os.environ)
    if args.worker_urls and config.fleet is not None:
        raise InvalidInput(
            f"{path} has workers already",
            where="--worker-urls",
            remedy="leave either out",
        )
    if not args.worker_urls and config.fleet is None:
        raise InvalidInput(
            "no endpoints",
            where=str(path or "command line"),
            remedy="list workers in the file, or give --worker-urls",
        )
    return config
