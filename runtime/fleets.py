"""A fleet that changes while it serves: indices stay, because calls in flight go by them.

An endpoint that leaves keeps its place, without an address; one that comes is added at the end,
or takes its old place again if it was there before.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from planner.domain.fleet import Endpoint, Fleet

__all__ = ["FleetChange", "merge", "present"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetChange:
    """What becomes of a fleet; endpoints by index.

    Parameters
    ----------
    fleet
        All places, those of absent endpoints included.
    absent
        Endpoints that are not part of the fleet any more.
    left
        Those of them that were until now.
    moved
        Endpoints to be reached under an address that is new to them, added ones included: nothing
        is known of their health or cache.
    """

    fleet: Fleet
    absent: frozenset[int]
    left: tuple[int, ...]
    moved: tuple[int, ...]


def merge(current: Fleet, absent: Collection[int], wanted: Fleet) -> FleetChange:
    """Return how a fleet becomes the wanted one.

    Parameters
    ----------
    current, absent
        All places so far, and those that are empty.
    wanted
        Endpoints with addresses; the same id is the same place.

    Raises
    ------
    FleetError
        If the endpoints do not go together.
    """
    by_id = {endpoint.id: endpoint for endpoint in wanted.endpoints}
    places: list[Endpoint] = []
    gone: list[int] = []
    moved: list[int] = []
    for index, old in enumerate(current.endpoints):
        fresh = by_id.pop(old.id, None)
        if fresh is None:
            gone.append(index)
            # It takes no part in checks of addresses and pools any more.
            places.append(replace(old, url=None, role="both"))
        else:
            places.append(fresh)
            if fresh.url != old.url or index in absent:
                moved.append(index)
    moved += range(len(places), len(places) + len(by_id))
    places += by_id.values()
    return FleetChange(
        fleet=Fleet(name=wanted.name, endpoints=tuple(places)),
        absent=frozenset(gone),
        left=tuple(index for index in gone if index not in absent),
        moved=tuple(moved),
    )


def present(fleet: Fleet, absent: Collection[int]) -> Fleet:
    """Return the fleet without its empty places."""
    if not absent:
        return fleet
    return Fleet(
        name=fleet.name,
        endpoints=tuple(
            endpoint for index, endpoint in enumerate(fleet.endpoints) if index not in absent
        ),
    )
