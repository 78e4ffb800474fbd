"""Faults of a fleet file."""

from __future__ import annotations

import math
import re

import pytest

from planner.domain.errors import FleetError
from planner.domain.faults import FAULT_KINDS, load_faults, read_fault, read_faults
from planner.domain.fleet import load_fleet

FLEET = """
schema: almanac.fleet/1
name: one
workers:
  - id: e0
    model: m
    gpu: H100
    latency: 8b-h100-1-bf16
    kv_blocks: 500
    slots: 4
    faults: {faults}
"""


@pytest.mark.parametrize("kind", FAULT_KINDS)
def test_each_kind_reads_with_its_defaults_and_is_written_back(kind):
    """A kind alone is a fault; what is written reads as the same fault."""
    fault = read_fault({"kind": kind}, "here")
    assert set(fault.settings) == set(FAULT_KINDS[kind].settings)
    assert read_fault(fault.to_json(), "here") == fault


def test_faults_come_with_their_worker_and_planning_ignores_them(tmp_path):
    """Faults are read in order of time; the fleet is the same with and without them."""
    path, plain = tmp_path / "fleet.yaml", tmp_path / "plain.yaml"
    path.write_text(
        FLEET.format(faults="[{kind: crash, at_s: 9}, {kind: drift, for_s: 5, factor: 2}]")
    )
    plain.write_text(FLEET.format(faults="[]"))
    drift, crash = load_faults(path)["e0"]
    assert (drift.kind, drift.end_s, drift.settings["factor"]) == ("drift", 5.0, 2.0)
    assert (crash.kind, crash.at_s) == ("crash", 9.0)
    assert load_fleet(path) == load_fleet(plain)
    assert crash.moved(3.0).at_s == 12.0


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ("yes", "workers[0].faults: expected a list"),
        ("[7]", "workers[0].faults[0]: expected a mapping"),
        ("[{at_s: 1}]", "workers[0].faults[0].kind: expected a kind of fault"),
        ("[{kind: flood}]", "'flood' is unknown; use one of blackhole"),
        ("[{kind: hang, at_s: -1}]", "workers[0].faults[0].at_s: -1 is not a number"),
        ("[{kind: hang, for_s: 0}]", "workers[0].faults[0].for_s: 0 is not a number"),
        ("[{kind: hang, factor: 2}]", "unknown field 'factor'; known fields: at_s, for_s, kind"),
        ("[{kind: http_503, share: 2}]", "faults[0].share: 2 is not a number; use a number in"),
        ("[{kind: crash, for_s: 9}, {kind: drain, at_s: 8}]", "drain at 8 s begins before crash"),
    ],
)
def test_a_wrong_fault_is_one_clear_error(tmp_path, faults, message):
    """File, worker, field, value and remedy are named."""
    path = tmp_path / "fleet.yaml"
    path.write_text(FLEET.format(faults=faults))
    with pytest.raises(FleetError, match=r"fleet\.yaml.*" + re.escape(message)):
        load_faults(path)


def test_faults_that_do_not_shut_the_door_may_overlap():
    """Slowness, delay and a crash at the same time are possible; null is for ever."""
    faults = read_faults(
        [{"kind": "straggler", "for_s": None}, {"kind": "network_delay"}, {"kind": "crash"}], "w"
    )
    assert [fault.for_s for fault in faults] == [math.inf, math.inf, 60.0]
