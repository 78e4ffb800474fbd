"""How changes are written, and read again.

===================== ==========================================================================
``+2xh100``           two more endpoints like the fleet's H100s (by id or GPU), or from the tables
``-e3``, ``-2xl4``    endpoint e3 leaves; two endpoints of this GPU do
``gpu e1=h200``       e1 moves to another GPU; ``gpu *=h200`` moves all
``model OLD=NEW``     endpoints and call sites of one model change to another
``load 1.2``          all arrival rates times 1.2
``tenant heavy=0``    the rates of one tenant times a number
``deadline 20``       deadlines of 20 s; ``+2`` relaxes those there are; ``heavy=+2`` of a tenant
``retention on``      idle KV is pinned; ``off`` drops it, ``lru`` leaves it to the engine, and
                      ``pin:60`` and ``offload`` say how
``split 2p3d``        two endpoints prefill, three decode; ``split off`` makes all serve whole
``slots e1=+4``       more (or fewer) calls side by side on e1
``kv e1=+2``          more (or less) KV cache on e1, GB
``policy NAME``       another policy; several parameters are joined by ``+``
===================== ==========================================================================

Commas join changes that are made together, in this order: ``+1xh100, -l4, load 1.5``. ``add`` and
``remove`` say the same as the signs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from planner.domain.errors import InvalidInput
from planner.whatif.changes import (
    AS_IT_IS,
    RETENTION_WORDS,
    AddEndpoints,
    AddKv,
    AddSlots,
    Change,
    RemoveEndpoints,
    ScaleLoad,
    ScaleTenant,
    Scenario,
    SetDeadline,
    SetPolicy,
    SetRetention,
    SplitPools,
    SwapGpu,
    SwapModel,
)
from planner.whatif.question import parse_retention

__all__ = ["parse_change", "parse_scenario"]


def parse_scenario(text: str) -> Scenario:
    """Return the changes written in a text, joined by commas; see the table above.

    Raises
    ------
    InvalidInput
        If one cannot be read.
    """
    parts = [part.strip() for part in text.split(",")]
    if text.strip() in ("", AS_IT_IS):
        return Scenario()
    return Scenario(changes=tuple(parse_change(part) for part in parts if part))


def parse_change(text: str) -> Change:
    """Return the change written in a text.

    Raises
    ------
    InvalidInput
        If it cannot be read, or a number is out of range.
    """
    words = re.sub(r"^(add|remove)\s+", lambda found: _SIGN[found[1]], text.strip())
    for form, make in _FORMS:
        found = re.fullmatch(form, words)
        if found is not None:
            return make(found, text)
    raise InvalidInput(
        f"{text!r} is no change",
        where="--change",
        remedy="write for example +2xh100, -e3, gpu e1=h200, model A=B, load 1.2, tenant heavy=0, "
        "deadline +2, retention off, split 2p3d, slots e1=+4, kv e1=+2 or policy NAME",
    )


_SIGN = {"add": "+", "remove": "-"}
Make = Callable[["re.Match[str]", str], Change]


def _number(text: str, whole: str, least: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value < math.inf:
        raise InvalidInput(
            f"{text!r} is not a number of at least {least:g}",
            where=f"change {whole!r}",
            remedy="correct it",
        )
    return value


def _count(text: str | None, whole: str) -> int:
    count = int(text or 1)
    if not 1 <= count <= 1000:
        raise InvalidInput(f"{count} endpoints", where=f"change {whole!r}", remedy="use 1 to 1000")
    return count


def _deadline(found: re.Match[str], text: str) -> Change:
    value = _number(found[2], text, -math.inf)
    more = found[2][0] in "+-"
    if not more and value <= 0:
        raise InvalidInput(f"{value:g} s", where=f"change {text!r}", remedy="use a number > 0")
    return SetDeadline(seconds=value, more=more, tenant=found[1])


def _retention(found: re.Match[str], _: str) -> Change:
    parse_retention(RETENTION_WORDS.get(found[1], found[1]))
    return SetRetention(word=found[1])


_FORMS: tuple[tuple[str, Make], ...] = (
    (r"\+(?:(\d+)\s*x\s*)?(\S+)", lambda m, t: AddEndpoints(count=_count(m[1], t), kind=m[2])),
    (r"-(?:(\d+)\s*x\s*)?(\S+)", lambda m, t: RemoveEndpoints(count=_count(m[1], t), kind=m[2])),
    (r"gpu\s+(\S+?)\s*=\s*(\S+)", lambda m, _: SwapGpu(endpoint=m[1], gpu=m[2])),
    (r"model\s+(\S+?)\s*=\s*(\S+)", lambda m, _: SwapModel(old=m[1], new=m[2])),
    (r"load\s+(\S+)", lambda m, t: ScaleLoad(factor=_number(m[1], t, 1e-6))),
    (
        r"tenant\s+(\S+?)\s*=\s*(\S+)",
        lambda m, t: ScaleTenant(tenant=m[1], factor=_number(m[2], t, 0.0)),
    ),
    (r"deadline\s+(?:(\S+?)\s*=\s*)?([+-]?[\d.]+)", _deadline),
    (r"retention\s+(\S+)", _retention),
    (r"split\s+off", lambda _m, _t: SplitPools(prefill=0, decode=0)),
    (
        r"split\s+([1-9]\d*)p([1-9]\d*)d",
        lambda m, _: SplitPools(prefill=int(m[1]), decode=int(m[2])),
    ),
    (
        r"slots\s+(\S+?)\s*=\s*([+-]\d+)",
        lambda m, _: AddSlots(endpoint=m[1], count=int(m[2])),
    ),
    (
        r"kv\s+(\S+?)\s*=\s*([+-][\d.]+)(?:GB)?",
        lambda m, t: AddKv(endpoint=m[1], gb=_number(m[2], t, -math.inf)),
    ),
    (r"policy\s+(\S+)", lambda m, _: SetPolicy(policy=m[1].replace("+", ","))),
)
