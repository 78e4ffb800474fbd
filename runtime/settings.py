"""Settings declared once: file key, flag, environment variable, check and help from one field.

A settings record is a frozen dataclass whose fields are made by `setting`. Each value has one of
four sources, the first that gives it wins::

    flag > environment variable ALMANAC_<SECTION>_<KEY> > file (section: {key: value}) > default

Each error names the source the value came from.
"""

from __future__ import annotations

import math
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from functools import cache
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

import yaml

from planner.domain.check import closed_mapping, items
from planner.domain.errors import InvalidInput

__all__ = [
    "PREFIX",
    "Setting",
    "Source",
    "check_values",
    "resolve",
    "setting",
    "settings_of",
    "shown",
    "unknown_variables",
]

PREFIX = "ALMANAC_"
"""Of every environment variable."""

_TRUE, _FALSE = frozenset({"1", "true", "yes", "on"}), frozenset({"0", "false", "no", "off"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One thing that may be set.

    Parameters
    ----------
    section, key
        Its place in the file.
    name
        Field of the record that holds it.
    kind
        ``float``, ``int``, ``bool``, ``str`` or ``tuple`` (of texts).
    optional
        Whether None (absent) is a value.
    help
        What it does, in one line, with its unit.
    flags
        Options of the command line, the first is the name shown.
    least, most
        Range of a number; ``above`` says that ``least`` itself is excluded.
    choices
        Words allowed, or nothing for any text.
    secret
        Whether its value is never shown.
    live
        Whether a reload changes it; the others wait for the next start.
    """

    section: str
    key: str
    name: str
    kind: type
    optional: bool
    default: Any
    help: str
    flags: tuple[str, ...]
    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    choices: tuple[str, ...] = ()
    secret: bool = False
    live: bool = True

    @property
    def path(self) -> str:
        """``section.key``."""
        return f"{self.section}.{self.key}"

    @property
    def variable(self) -> str:
        """Name of the environment variable."""
        return f"{PREFIX}{self.section}_{self.key}".upper()

    def check(self, value: Any, where: str) -> Any:
        """Return a value of a file as the record holds it.

        Raises
        ------
        InvalidInput
            Naming ``where``, the value and the remedy.
        """
        if value is None and self.optional:
            return None
        if self.kind is tuple:
            return tuple(self._one(part, f"{where}[{at}]") for at, part in _parts(value, where))
        if self.kind is bool:
            if not isinstance(value, bool):
                raise InvalidInput(
                    f"{value!r:.80} is neither true nor false", where=where, remedy="use one"
                )
            return value
        if self.kind is str:
            return self._one(value, where)
        return self._number(value, where)

    def read(self, text: str | Sequence[str], where: str) -> Any:
        """Return a value given as text by a flag or a variable; lists are split at commas."""
        if not isinstance(text, str):
            text = ",".join(text)
        if self.kind is tuple:
            return self.check([part.strip() for part in text.split(",") if part.strip()], where)
        if self.kind is str:
            return self.check(text or None if self.optional else text, where)
        if self.kind is bool:
            word = text.strip().lower()
            return self.check(True if word in _TRUE else False if word in _FALSE else text, where)
        try:
            number: Any = float(text) if self.kind is float else int(text)
        except ValueError:
            number = text
        return self.check(number, where)

    def _one(self, value: Any, where: str) -> str:
        if not isinstance(value, str) or not value:
            shown = "the value" if self.secret else f"{value!r:.80}"
            raise InvalidInput(f"{shown} is no text", where=where, remedy="give a text")
        if self.choices and value not in self.choices:
            raise InvalidInput(
                f"{value!r:.80} is unknown",
                where=where,
                remedy=f"use one of {', '.join(self.choices)}",
            )
        return value

    def _number(self, value: Any, where: str) -> float | int:
        wrong = isinstance(value, bool) or not isinstance(value, (int, float))
        if not wrong and self.kind is int:
            wrong = value != int(value) if math.isfinite(value) else True
        if wrong:
            what = "an integer" if self.kind is int else "a number"
            raise InvalidInput(f"{value!r:.80} is not {what}", where=where, remedy=f"use {what}")
        low = value <= self.least if self.above else value < self.least
        if low or value > self.most or not math.isfinite(value):
            raise InvalidInput(
                f"{value!r} is out of range", where=where, remedy=f"use a number {self._range}"
            )
        return self.kind(value)  # type: ignore[no-any-return]

    @property
    def _range(self) -> str:
        if math.isfinite(self.most):
            return f"from {self.least:g} to {self.most:g}"
        return f"above {self.least:g}" if self.above else f">= {self.least:g}"


def _parts(value: Any, where: str) -> Iterable[tuple[int, Any]]:
    return enumerate([value] if isinstance(value, str) else items(value, where))


def setting(
    default: Any,
    section: str,
    help_: str,
    *,
    key: str = "",
    flags: Sequence[str] = (),
    least: float = 0.0,
    most: float = math.inf,
    above: bool = False,
    choices: Sequence[str] = (),
    secret: bool = False,
    live: bool = True,
) -> Any:
    """Return a dataclass field that is a setting; see `Setting`.

    Parameters
    ----------
    key
        Name in the file; that of the field if empty.
    flags
        Options; ``--<key with dashes>`` if none.
    """
    facts = {
        "section": section, "key": key, "help": help_, "flags": tuple(flags), "least": least,
        "most": most, "above": above, "choices": tuple(choices), "secret": secret, "live": live,
    }  # fmt: skip
    return field(default=default, metadata={"setting": facts})


@cache
def settings_of(kind: type) -> tuple[Setting, ...]:
    """Return the settings of a record in the order of its fields."""
    hints = get_type_hints(kind)
    found = []
    for one in fields(kind):
        facts = one.metadata.get("setting")
        if facts is None:
            continue
        assert one.default is not MISSING  # noqa: S101 - `setting` gives one
        key = facts["key"] or one.name
        plain, optional = _plain(hints[one.name])
        found.append(
            Setting(
                name=one.name,
                kind=plain,
                optional=optional,
                default=one.default,
                **{
                    **facts,
                    "key": key,
                    "flags": facts["flags"] or (f"--{key.replace('_', '-')}",),
                },
            )
        )
    return tuple(found)


def _plain(hint: Any) -> tuple[type, bool]:
    """Return the plain type of an annotation, and whether it may be None."""
    optional = False
    if get_origin(hint) in (Union, types.UnionType):
        inner = [one for one in get_args(hint) if one is not type(None)]
        optional, hint = True, inner[0]
    return get_origin(hint) or hint, optional


def check_values(record: Any) -> None:
    """Check the fields of a settings record; for its ``__post_init__``.

    Raises
    ------
    InvalidInput
        Naming the field.
    """
    for one in settings_of(cast("type", type(record))):
        one.check(getattr(record, one.name), one.name)


@dataclass(frozen=True, slots=True)
class Source:
    """A value and where it came from: ``flag``, ``env``, ``file`` or ``default``."""

    value: Any
    origin: str


def resolve(
    settings: Iterable[Setting],
    *,
    file: Mapping[str, Any],
    file_name: str,
    environment: Mapping[str, str],
    flags: Mapping[str, Any],
) -> dict[str, Source]:
    """Return every setting's value with its source, by path.

    Parameters
    ----------
    file
        Section -> mapping of keys, as parsed; sections without settings are left alone.
    file_name
        For errors.
    environment
        Variables of the process.
    flags
        Path -> text, list of texts or bool, of the options given.

    Raises
    ------
    InvalidInput
        If a value is wrong or a section holds an unknown key.
    """
    listed = list(settings)
    sections: dict[str, list[str]] = {}
    for one in listed:
        sections.setdefault(one.section, []).append(one.key)
    given: dict[str, Mapping[str, Any]] = {}
    for section, keys in sections.items():
        if section in file:
            where = f"{file_name}: {section}"
            given[section] = closed_mapping(file[section] or {}, where, keys)
    values: dict[str, Source] = {}
    for one in listed:
        flag, text = flags.get(one.path), environment.get(one.variable)
        if flag is not None:
            wanted = flag if isinstance(flag, bool) else one.read(flag, one.flags[0])
            values[one.path] = Source(wanted, "flag")
        elif text is not None:
            values[one.path] = Source(one.read(text, one.variable), "env")
        elif one.key in given.get(one.section, {}):
            where = f"{file_name}: {one.path}"
            values[one.path] = Source(one.check(given[one.section][one.key], where), "file")
        else:
            values[one.path] = Source(one.default, "default")
    return values


def unknown_variables(settings: Iterable[Setting], environment: Mapping[str, str]) -> list[str]:
    """Return a line for each variable that looks like a setting and is none."""
    listed = list(settings)
    known = {one.variable for one in listed}
    sections = tuple(f"{PREFIX}{section}_".upper() for section in {one.section for one in listed})
    lines = []
    for name in sorted(environment):
        # Container platforms set NAME_SERVICE_* and NAME_PORT_* for services called like ours.
        if name.startswith(sections) and name not in known and "_SERVICE_" not in name:
            close = get_close_matches(name, known, n=1)
            lines.append(f"{name} is no setting" + (f", {close[0]} is" if close else ""))
    return lines


def shown(settings: Iterable[Setting], values: Mapping[str, Source]) -> str:
    """Return the values as a YAML file whose comments name the sources; secrets are hidden."""
    lines: list[str] = []
    section = ""
    for one in sorted(settings, key=lambda each: each.section):
        if one.section != section:
            section = one.section
            lines.append(f"{section}:")
        source = values[one.path]
        value = list(source.value) if isinstance(source.value, tuple) else source.value
        text = (
            "'***'"
            if one.secret and value is not None
            else yaml.safe_dump(value, default_flow_style=True, width=10**6).splitlines()[0]
        )
        lines.append(f"  {one.key}: {text}  # {source.origin}")
    return "\n".join(lines) + "\n"
