"""Which tenant a request belongs to: by its key alone, never by a header that anyone can write.

Keys are kept as SHA-256 digests, and a request's key is compared with every one of them in
constant time, so that neither a dump of the process nor the time of an answer gives one away.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from planner.domain.check import closed_mapping, integer, items, number, text
from planner.domain.errors import InvalidInput
from planner.domain.files import read_text
from runtime.limits import ANYONE, Tenant
from runtime.wire import ApiError

__all__ = ["KeyedTenancy", "TenantKey", "bearer", "read_key", "read_tenants", "same_key"]

_FIELDS = frozenset(
    {
        "name", "key_env", "key_file", "weight", "max_in_flight", "requests_per_minute",
        "tokens_per_minute", "priority",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantKey:
    """A tenant and the digest of its key."""

    tenant: Tenant
    digest: bytes

    def __repr__(self) -> str:
        return f"TenantKey({self.tenant.name!r})"


class KeyedTenancy:
    """Tells tenants apart by the bearer key of their requests.

    Parameters
    ----------
    tenants
        With their keys; nobody needs a key if there are none, and everybody is `ANYONE`.
    """

    __slots__ = ("_tenants",)

    def __init__(self, tenants: Sequence[TenantKey] = ()) -> None:
        self._tenants = tuple(tenants)

    @property
    def keyed(self) -> bool:
        """Whether requests need a key."""
        return bool(self._tenants)

    @property
    def tenants(self) -> tuple[Tenant, ...]:
        """All tenants, in the order of the file."""
        return tuple(one.tenant for one in self._tenants) or (ANYONE,)

    def salt(self, tenant: Tenant, own: Any = None) -> str | None:
        """Return the ``cache_salt`` that keeps a tenant's cached prefixes to itself.

        None without keys. Derived from the tenant's key, so that no other one can guess it, and
        from the salt the client sent itself.
        """
        for one in self._tenants:
            if one.tenant is tenant:
                text = own.encode("utf-8", "replace") if isinstance(own, str) else b""
                return hmac.new(one.digest, b"cache_salt:" + text, "sha256").hexdigest()
        return None

    def of(self, headers: Mapping[str, str]) -> Tenant:
        """Return the tenant whose key a request bears.

        Raises
        ------
        ApiError
            401 if the key is missing or nobody's.
        """
        if not self._tenants:
            return ANYONE
        given = _digest(bearer(headers))
        found: Tenant | None = None
        for one in self._tenants:  # all of them, so that the time does not tell which matched
            if hmac.compare_digest(given, one.digest):
                found = one.tenant
        if found is None:
            raise ApiError(401, "Wrong or missing API key.")
        return found


def bearer(headers: Mapping[str, str]) -> str:
    """Return the key of ``authorization: Bearer <key>`` or ``x-api-key``; empty without one."""
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "")


def same_key(given: str, key: str) -> bool:
    """Return whether two keys are equal, in a time that does not depend on where they differ."""
    return hmac.compare_digest(_digest(given), _digest(key))


def _digest(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogateescape")).digest()


def read_key(path: Path, where: str) -> str:
    """Return the key that a file holds, without the white space around it.

    Raises
    ------
    InvalidInput
        If it cannot be read or is empty.
    """
    key = read_text(path, what="key file").strip()
    if not key:
        raise InvalidInput(f"{path} is empty", where=where, remedy="write the key into it")
    return key


def read_tenants(value: Any, where: str, environment: Mapping[str, str]) -> tuple[TenantKey, ...]:
    """Return the tenants of a file's section, with their keys read.

    Raises
    ------
    InvalidInput
        Naming place, field, value and remedy; keys are never shown.
    """
    found: list[TenantKey] = []
    for position, raw in enumerate(items(value, where)):
        one = _tenant(raw, f"{where}[{position}]", environment)
        for other in found:
            if other.tenant.name == one.tenant.name:
                raise InvalidInput(
                    f"name {one.tenant.name!r} is used twice",
                    where=f"{where}[{position}].name",
                    remedy="give each tenant its own name",
                )
            if other.digest == one.digest:
                raise InvalidInput(
                    f"{one.tenant.name!r} has the key of {other.tenant.name!r}",
                    where=f"{where}[{position}]",
                    remedy="give each tenant its own key",
                )
        found.append(one)
    return tuple(found)


def _tenant(value: Any, where: str, environment: Mapping[str, str]) -> TenantKey:
    raw = closed_mapping(value, where, _FIELDS)
    variable, file = raw.get("key_env"), raw.get("key_file")
    if (variable is None) == (file is None):
        raise InvalidInput(
            "a tenant needs one key", where=where, remedy="give either key_env or key_file"
        )
    if variable is not None:
        key = environment.get(text(variable, f"{where}.key_env"), "")
        if not key:
            raise InvalidInput(
                f"the environment variable {variable!r} is not set or empty",
                where=f"{where}.key_env",
                remedy=f"export {variable}=<secret>",
            )
    else:
        key = read_key(Path(text(file, f"{where}.key_file")), f"{where}.key_file")

    def limit(name: str) -> float | None:
        given = raw.get(name)
        return None if given is None else number(given, f"{where}.{name}", least=1e-6)

    most = raw.get("max_in_flight")
    tenant = Tenant(
        name=text(raw.get("name"), f"{where}.name"),
        weight=number(raw.get("weight", 1.0), f"{where}.weight", least=1e-6),
        max_in_flight=(None if most is None else integer(most, f"{where}.max_in_flight", least=1)),
        requests_per_minute=limit("requests_per_minute"),
        tokens_per_minute=limit("tokens_per_minute"),
        priority=integer(raw.get("priority", 0), f"{where}.priority", least=-1000, most=1000),
    )
    return TenantKey(tenant=tenant, digest=_digest(key))
