"""What `almanac serve` may be told: one file, flags, environment variables, defaults.

Every time is in wall seconds unless it says otherwise. The file is a fleet file
(`planner.domain.fleet.load_fleet`) with further sections, each of which may be left out::

    schema: almanac.fleet/1
    workers: [{id, url, model, gpu, latency, slots, role, labels, ...}]
    policy: {name: almanac, table: table.json}        # or policy: marginal_cost:theta=2
    server: {host: 127.0.0.1, port: 8000}
    tls: {cert: server.pem, key: server.key}
    limits: {hold_limit: 1000}
    faults: {retries: 2}
    hints: {sources: [almanac, nvext]}
    identity: {headers: [x-session-id]}
    telemetry: {scrape_interval_s: 5}
    tenants: [{name: team, key_env: TEAM_KEY, weight: 2}]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

from planner.domain.check import closed_mapping
from planner.domain.errors import InvalidInput
from planner.domain.files import read_yaml
from planner.domain.fleet import FLEET_SCHEMA, SECTIONS, Fleet, parse_fleet
from runtime.hints import HINT_SOURCES
from runtime.identity import SESSION_FIELDS, SESSION_HEADERS
from runtime.keys import TenantKey, read_key, read_tenants
from runtime.settings import Setting, Source, check_values, resolve, setting, settings_of

__all__ = [
    "GatewayConfig",
    "LaunchConfig",
    "ServeConfig",
    "all_settings",
    "load_config",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """Settings of a gateway's state; each field says itself what it means.

    Raises
    ------
    InvalidInput
        If a value is out of range, or the live view is asked for without an admin key.
    """

    dilation: float = setting(
        1.0,
        "server",
        "engine seconds per real second; that of the mock fleet, 1 in front of real engines",
        above=True,
        live=False,
    )
    seed: int = setting(
        0, "server", "seed of policies that draw at random, and of sampled runs", live=False
    )
    max_body_bytes: int = setting(64 * 2**20, "server", "largest request body", least=1, live=False)
    max_header_bytes: int = setting(
        32 * 2**10, "server", "largest header of a request, and largest request line", least=1024,
        live=False,
    )  # fmt: skip
    drain_s: float = setting(
        20.0, "server", "time given to calls in flight when the gateway is stopped", live=False
    )
    admin_key: str | None = setting(
        None,
        "server",
        "key of the admin routes, off without; better given by admin_key_env or admin_key_file",
        secret=True,
    )
    dashboard: bool = setting(
        False,
        "server",
        "serve a live view for browsers at /dashboard; it asks for the admin key",
        live=False,
    )
    request_id_headers: tuple[str, ...] = setting(
        ("x-request-id",), "server", "headers that may bring a request's id, first hit wins"
    )
    online: bool = setting(
        True,
        "policy",
        "let latency, lengths and finish forecasts follow the calls that finish",
        live=False,
    )
    retries: int = setting(
        2,
        "faults",
        "further attempts after the first, before the first byte",
        flags=("--retries", "--retry-max-retries"),
    )
    connect_timeout_s: float = setting(5.0, "faults", "limit on a connect", above=True, live=False)
    read_timeout_s: float = setting(
        600.0,
        "faults",
        "limit on the silence between two reads of an answer",
        above=True,
        flags=("--read-timeout-s", "--request-timeout-secs"),
        live=False,
    )
    breaker_failures: int = setting(
        3,
        "faults",
        "consecutive failures that take an endpoint down",
        least=1,
        flags=("--breaker-failures", "--cb-failure-threshold"),
        live=False,
    )
    breaker_pause_s: float = setting(
        1.0, "faults", "least time down before a probe may bring it back", above=True, live=False
    )
    probe_interval_s: float = setting(
        0.5,
        "faults",
        "how often endpoints that are down are looked at",
        above=True,
        flags=("--probe-interval-s", "--health-check-interval-secs"),
    )
    health_interval_s: float = setting(
        10.0, "faults", "how often the health of endpoints that are up is looked at; 0 for never"
    )
    timeout_multiple: float = setting(
        3.0,
        "faults",
        "multiple of the forecast quantile after which a first byte, or the next one, is late",
        least=1.0,
        live=False,
    )
    first_byte_floor_s: float = setting(
        2.0, "faults", "least limit on a first byte", above=True, live=False
    )
    stall_floor_s: float = setting(
        10.0,
        "faults",
        "least limit on the silence of an endpoint in the middle of an answer",
        above=True,
        live=False,
    )
    trial_share: float = setting(
        0.01,
        "faults",
        "largest share of calls sent to an endpoint on trial",
        above=True,
        most=1.0,
        live=False,
    )
    slow_ratio: float = setting(
        4.0,
        "faults",
        "times slower than its own usual, against its peers, from which an endpoint is left out",
        least=1.0,
        above=True,
        live=False,
    )
    max_ejected: float = setting(
        0.5,
        "faults",
        "largest share of a model's endpoints left out because the others do better",
        most=1.0,
        live=False,
    )
    hedge_share: float = setting(
        0.0,
        "faults",
        "share of calls that may be sent a second time because they are late; 0 for none",
        most=1.0,
        live=False,
    )
    hedge_level: float = setting(
        0.95,
        "faults",
        "quantile of the forecast first byte after which a call is late",
        least=0.5,
        above=True,
        most=0.999,
        live=False,
    )
    max_in_flight: int | None = setting(
        None,
        "limits",
        "calls under way at a time",
        least=1,
        flags=("--max-in-flight", "--max-concurrent-requests"),
    )
    queue_limit: int = setting(
        1000,
        "limits",
        "calls that may wait for their turn where there are limits",
        flags=("--queue-limit", "--queue-size"),
    )
    queue_timeout_s: float = setting(
        30.0,
        "limits",
        "how long a call may wait for its turn",
        above=True,
        flags=("--queue-timeout-s", "--queue-timeout-secs"),
    )
    ageing_s: float = setting(
        10.0,
        "limits",
        "wait after which a call goes before all later ones, whatever its class",
        above=True,
    )
    hold_limit: int = setting(
        1000,
        "limits",
        "calls that may wait while no endpoint can take them",
        live=False,
    )
    hold_timeout_s: float = setting(
        30.0,
        "limits",
        "how long such a call may wait",
        above=True,
        live=False,
    )
    hint_sources: tuple[str, ...] = setting(
        HINT_SOURCES,
        "hints",
        "whose hints are read, first hit wins; none turns them off",
        key="sources",
        flags=("--hint-sources",),
        choices=HINT_SOURCES,
    )
    session_headers: tuple[str, ...] = setting(
        SESSION_HEADERS,
        "identity",
        "headers that name the session, first hit wins",
        key="headers",
        flags=("--identity-headers",),
    )
    session_fields: tuple[str, ...] = setting(
        SESSION_FIELDS,
        "identity",
        "body fields that name it where no header does; dots lead inside",
        key="fields",
        flags=("--identity-fields",),
    )
    run_idle_s: float = setting(
        900.0,
        "identity",
        "engine seconds of silence after which a run of which nothing more is known has ended",
        key="idle_s",
        flags=("--run-idle-s",),
        above=True,
    )
    run_done_idle_s: float = setting(
        5.0,
        "identity",
        "the same after the last node of a run's workflow",
        key="done_idle_s",
        flags=("--run-done-idle-s",),
        above=True,
    )
    share_prefixes: bool = setting(
        False,
        "limits",
        "let tenants share cached prompt prefixes, which lets one time what another has asked",
    )
    scrape_interval_s: float = setting(
        5.0, "telemetry", "how often each endpoint's /metrics is read; 0 for never"
    )
    scrape_stale_s: float = setting(
        30.0, "telemetry", "age beyond which what was read counts as missing", above=True
    )
    label_limit: int = setting(
        1000,
        "telemetry",
        "values a client may give a metric's label; further ones count as 'other'",
        least=1,
        live=False,
    )

    def __post_init__(self) -> None:
        check_values(self)
        if self.dashboard and not self.admin_key:
            raise InvalidInput(
                "the live view shows nothing without an admin key",
                where="dashboard",
                remedy="give --admin-key-env NAME or --admin-key-file FILE, too",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """Settings of the process around it: where it listens, and what it reads at the start.

    Raises
    ------
    InvalidInput
        If a value is out of range, or only one of certificate and key is given.
    """

    host: str = setting("127.0.0.1", "server", "interface to listen on", live=False)
    port: int = setting(8000, "server", "port, 0 takes a free one", most=65535, live=False)
    processes: int = setting(
        1,
        "server",
        "worker processes that share the port, where one does not keep up",
        flags=("--workers",),
        least=1,
        most=256,
        live=False,
    )
    admin_key_env: str | None = setting(
        None, "server", "environment variable that holds the key of the admin routes"
    )
    admin_key_file: str | None = setting(
        None, "server", "file that holds the key of the admin routes"
    )
    require_ready: bool = setting(
        False,
        "server",
        "exit with 1 if an endpoint does not answer at the start, instead of waiting for it",
        live=False,
    )
    log_level: str = setting(
        "warning",
        "server",
        "least level of log lines on stderr",
        choices=("debug", "info", "warning", "error"),
    )
    state: str | None = setting(
        None, "server", "file to keep what was learned across restarts in", live=False
    )
    state_interval_s: float = setting(
        5.0, "server", "how often it is written", above=True, live=False
    )
    policy: str = setting(
        "almanac",
        "policy",
        "NAME or NAME:KEY=VALUE,..., see `almanac simulate --help`",
        key="name",
        flags=("--policy",),
    )
    table: str | None = setting(None, "policy", "dispatch table made by `almanac plan`")
    estimates: str | None = setting(
        None, "policy", "estimate table made by `almanac train`", live=False
    )
    workflows: tuple[str, ...] = setting(
        (), "policy", "workflow graph known from the start; may be repeated", flags=("--workflow",)
    )
    trace: str | None = setting(
        None, "telemetry", "append what happens to this trace (JSON Lines)", live=False
    )
    otlp: bool = setting(
        False,
        "telemetry",
        "send OpenTelemetry spans; where to, by the OTEL_* variables",
        live=False,
    )
    cert: str | None = setting(
        None, "tls", "certificate chain (PEM) to serve HTTPS with", flags=("--tls-cert",),
        live=False,
    )  # fmt: skip
    key: str | None = setting(
        None, "tls", "its private key (PEM)", flags=("--tls-key",), live=False
    )

    def __post_init__(self) -> None:
        check_values(self)
        if (self.cert is None) != (self.key is None):
            raise InvalidInput(
                "certificate and key belong together",
                where="tls",
                remedy="give both tls.cert and tls.key, or neither",
            )


_RECORDS: tuple[type, ...] = (LaunchConfig, GatewayConfig)
_Record = TypeVar("_Record")


def all_settings() -> tuple[Setting, ...]:
    """Return every setting there is."""
    return tuple(one for record in _RECORDS for one in settings_of(record))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Everything `almanac serve` was told.

    Parameters
    ----------
    fleet
        Endpoints of the file, or None where only addresses were given.
    sources
        Each setting's value and origin, by path.
    """

    launch: LaunchConfig
    gateway: GatewayConfig
    tenants: tuple[TenantKey, ...]
    fleet: Fleet | None
    sources: Mapping[str, Source]


def load_config(
    path: Path | None,
    *,
    flags: Mapping[str, Any] | None = None,
    environment: Mapping[str, str],
) -> ServeConfig:
    """Read and check everything that was said about a gateway.

    Parameters
    ----------
    path
        The file, or None without one.
    flags
        Path of a setting -> value of the option given.
    environment
        Variables of the process; also where keys of tenants are read.

    Raises
    ------
    InvalidInput
        Naming file (or flag, or variable), field, value and remedy.
    """
    document: dict[str, Any] = {}
    fleet = None
    name = str(path or "command line")
    if path is not None:
        raw = closed_mapping(
            read_yaml(path, what="fleet file"), name, {"schema", "name", "workers", *SECTIONS}
        )
        if "workers" in raw:
            fleet = parse_fleet(raw, name, default_name=path.stem)
        elif raw.get("schema", FLEET_SCHEMA) != FLEET_SCHEMA:
            raise InvalidInput(
                f"{raw['schema']!r} is not a schema this version reads",
                where=f"{name}: schema",
                remedy=f"write schema: {FLEET_SCHEMA}",
            )
        document = dict(raw)
    if isinstance(document.get("policy"), str):
        document["policy"] = {"name": document["policy"]}
    settings = all_settings()
    sources = resolve(
        settings, file=document, file_name=name, environment=environment, flags=flags or {}
    )
    launch = _record(LaunchConfig, sources, name)
    gateway = _record(GatewayConfig, sources, name, admin_key=_admin_key(sources, environment))
    tenants = read_tenants(document.get("tenants") or (), f"{name}: tenants", environment)
    return ServeConfig(
        launch=launch,
        gateway=gateway,
        tenants=tenants,
        fleet=fleet,
        sources=sources,
    )


def _record(
    kind: Callable[..., _Record], sources: Mapping[str, Source], name: str, **given: Any
) -> _Record:
    values = {one.name: sources[one.path].value for one in settings_of(cast("type", kind))} | given
    try:
        return kind(**values)
    except InvalidInput as error:
        raise InvalidInput(
            error.what, where=f"{name}: {error.where}", remedy=error.remedy
        ) from error


def _admin_key(sources: Mapping[str, Source], environment: Mapping[str, str]) -> str | None:
    """Return the key given directly, by variable or by file."""
    direct = sources["server.admin_key"].value
    variable = sources["server.admin_key_env"].value
    file = sources["server.admin_key_file"].value
    if direct is not None:
        return cast("str", direct)
    if variable is not None:
        key = environment.get(variable)
        if not key:
            raise InvalidInput(
                f"the environment variable {variable!r} is not set or empty",
                where="--admin-key-env",
                remedy=f"export {variable}=<secret>",
            )
        return key
    return None if file is None else read_key(Path(file), "--admin-key-file")
