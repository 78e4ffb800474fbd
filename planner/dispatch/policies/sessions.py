"""Whose text a piece of prompt is, and how large its owner's context is, for eviction."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from planner.dispatch.events import Call

__all__ = ["NOBODY", "Owner", "Sessions"]


@dataclass(slots=True)
class Owner:
    """A run that holds text.

    Parameters
    ----------
    call
        Its latest call.
    items
        Fingerprint items first seen in its prompts.
    """

    call: Call
    items: list[int] = field(default_factory=list)


NOBODY = Owner(Call(call_id=""))
"""Stands for the owner of text that no prompt has held."""


class Sessions:
    """Owners of prompt text by fingerprint item."""

    def __init__(self) -> None:
        self._runs: dict[str, Owner] = {}
        self._owners: dict[int, Owner | None] = {}  # None: of several runs
        self.largest_tokens = 1
        self._largest = NOBODY  # the owner of a context as large

    def arrived(self, call: Call) -> None:
        """Note the prompt of a call that has become ready."""
        if not call.run_id:
            return
        owner = self._runs.setdefault(call.run_id, Owner(call))
        owner.call = call
        owners = self._owners
        for item in call.prefix:
            if item not in owners:
                owners[item] = owner
                owner.items.append(item)
            elif owners[item] is not owner:
                owners[item] = None
        largest = self._largest
        if largest is owner or self._runs.get(largest.call.run_id) is not largest:
            self._largest = max(self._runs.values(), key=lambda one: one.call.prompt_tokens)
        elif call.prompt_tokens > self.largest_tokens:
            self._largest = owner
        self.largest_tokens = self._largest.call.prompt_tokens

    def ended(self, run_id: str) -> None:
        """Forget a run that is over."""
        owner = self._runs.pop(run_id, None)
        for item in owner.items if owner else ():
            del self._owners[item]

    def owners_of(self, items: Iterable[int]) -> Iterator[Owner | None]:
        """Return the only run that has used each item, None if there are several.

        `NOBODY` for those that no prompt has held.
        """
        find = self._owners.get
        return (find(item, NOBODY) for item in items)
