"""The decorator of records that are made by the thousand a second: events, calls, trace lines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar, dataclass_transform

__all__ = ["record"]

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
def record(*, kw_only: bool = True) -> Callable[[type[T]], type[T]]:
    """Make a class a slotted dataclass that is frozen for the type checker, and hashable.

    Not at run time: a frozen dataclass takes 3 to 5 times as long to make, since it goes through
    ``object.__setattr__`` for each field, and that was a tenth of a simulation. Who changes one is
    told so by the type checker; `dataclasses.replace` makes changed copies.

    Parameters
    ----------
    kw_only
        Whether all fields are keyword-only.
    """
    return dataclass(slots=True, kw_only=kw_only, unsafe_hash=True)
