"""From our own traces to the estimate table that the planner and the runtime read.

Everything here is counted and shrunk per call site, tool node, branch and endpoint: a table look-up
cannot depend on a run's history, so the conditional predictors add nothing to it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from models.branching import visit_probabilities
from models.calibration import conformal_offsets, shifted
from models.endpoint_latency import call_design, fit_row, row_seconds
from models.importers.own import OwnTraces
from models.output_length import site_output_tokens
from models.tool_delay import node_delay_s
from planner.domain.estimates import (
    LEVELS,
    EstimateTable,
    Quantiles,
    SiteEstimate,
    WorkflowEstimate,
)
from planner.domain.fleet import Endpoint, latency_rows
from planner.domain.latency import LatencyRow
from planner.domain.workflow import Branch, CallSite, Workflow

__all__ = ["EndpointFit", "estimate_table", "fit_endpoints"]

LEAST_CALLS = 30
"""Calls an endpoint needs before its row is learned; fewer leave the fleet file's row in place."""
LEAST_VISITS = 5
"""Choices a visit of a branch needs to have probabilities of its own."""
ANCHOR_ROW = "8b-a100-1-bf16"
"""Prior row of an endpoint without a fleet file: its shape, not its speed, which is fitted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointFit:
    """A learned row and how well it explains calls it has not seen.

    Parameters
    ----------
    row
        Fitted on all calls.
    observed_s, predicted_s, prior_s, constant_s
        Service times of the held-out calls (sending to finish): observed; by a row fitted on the
        earlier calls; by the fleet file's row; by the median of the earlier calls. The state of
        the endpoint and the output length are taken as known.
    """

    row: LatencyRow
    calls: int
    observed_s: np.ndarray
    predicted_s: np.ndarray
    prior_s: np.ndarray
    constant_s: np.ndarray


def fit_endpoints(
    calls: pd.DataFrame, endpoints: Mapping[str, Endpoint]
) -> tuple[dict[str, EndpointFit], dict[str, int]]:
    """Fit a latency row per endpoint.

    Parameters
    ----------
    calls
        Usable calls of `models.importers.own.OwnTraces`.
    endpoints
        The fleet's endpoints by id, for prior rows, slots and step budgets; may be empty.

    Returns
    -------
    fits by endpoint id, and the rows not used by reason.

    Notes
    -----
    Calls sent while all slots were taken waited in the engine's queue, which the latency row does
    not describe: they shape the load of the others but are not fitted. Prompts whose
    ``cached_tokens`` was not reported count as uncached.
    """
    fits: dict[str, EndpointFit] = {}
    skipped: dict[str, int] = {}

    def skip(reason: str, rows: int) -> None:
        if rows:
            skipped[reason] = skipped.get(reason, 0) + rows

    timed = calls[calls["first_token_s"].notna() & calls["finish_s"].notna()]
    for name, mine in timed.groupby("endpoint", sort=True):
        endpoint = endpoints.get(str(name))
        prior = endpoint.latency if endpoint else latency_rows()[ANCHOR_ROW]
        slots = endpoint.max_num_seqs if endpoint else np.inf
        budget = float(endpoint.max_num_batched_tokens) if endpoint else 2048.0
        designs, seconds, late = [], [], []
        for _, trace in mine.groupby("file", sort=True):
            design, spent = call_design(
                trace.assign(cached_tokens=trace["cached_tokens"].fillna(0.0)), budget
            )
            free = (trace["in_flight"] < slots).to_numpy()
            skip("sent while all slots of the endpoint were taken", int((~free).sum()))
            designs.append(design.reshape(2, -1, 6)[:, free])
            seconds.append(spent.reshape(2, -1)[:, free])
            late.append(trace["held_out"].to_numpy(bool)[free])
        design, spent = np.concatenate(designs, axis=1), np.concatenate(seconds, axis=1)
        test = np.concatenate(late)
        if design.shape[1] < LEAST_CALLS or not test.any() or test.all():
            skip(
                f"fewer than {LEAST_CALLS} calls on the endpoint, its row is kept", design.shape[1]
            )
            continue

        def predict(row: LatencyRow, part: np.ndarray) -> np.ndarray:
            return np.asarray((part @ row_seconds(row)).sum(axis=0))

        total = spent.sum(axis=0)
        early_row = fit_row(design[:, ~test].reshape(-1, 6), spent[:, ~test].ravel(), prior)
        fits[str(name)] = EndpointFit(
            row=fit_row(design.reshape(-1, 6), spent.ravel(), prior),
            calls=design.shape[1],
            observed_s=total[test],
            predicted_s=predict(early_row, design[:, test]),
            prior_s=predict(prior, design[:, test]),
            constant_s=np.full(int(test.sum()), float(np.median(total[~test]))),
        )
    return fits, skipped


def estimate_table(
    own: OwnTraces, workflows: Mapping[str, Workflow], endpoints: Mapping[str, LatencyRow]
) -> EstimateTable:
    """Return the estimate table of the workflows seen in the traces or given as graphs.

    Parameters
    ----------
    own
        Usable records.
    workflows
        Graphs by content hash, which add unseen sites and outcomes, declared hints and static
        prefixes; a workflow may be seen without its graph.
    endpoints
        Learned latency rows by endpoint id.
    """
    samples = {
        (str(workflow), str(site)): rows["output_tokens"].tolist()
        for (workflow, site), rows in own.calls.groupby(["workflow_hash", "site"])
    }
    keyed = {f"{workflow}/{site}": values for (workflow, site), values in samples.items()}
    outputs, pooled = site_output_tokens(keyed)
    offsets = _length_offsets(own.calls)
    delay_offsets = _delay_offsets(own.tools)
    outputs = {site: _promised(quantiles, offsets) for site, quantiles in outputs.items()}
    names = dict(zip(own.runs["workflow_hash"], own.runs["workflow"], strict=True))
    seen = {str(value) for value in (*own.calls["workflow_hash"], *own.runs["workflow_hash"])}
    table = EstimateTable()
    default = table.default_site
    if len(own.calls):
        default = replace(default, output_tokens=replace(pooled, provenance="prior"))
    rows = {}
    for key in sorted(seen | set(workflows)):
        graph = workflows.get(key)
        declared: dict[str, CallSite] = {site.id: site for site in _sites(graph)}
        calls = own.calls[own.calls["workflow_hash"] == key]
        sites = {
            str(site): _site(mine, outputs[f"{key}/{site}"], declared.get(str(site)))
            for site, mine in calls.groupby("site")
        }
        for site, hint in declared.items():
            if site not in sites:
                sites[site] = _unseen_site(hint, default)
        rows[key] = WorkflowEstimate(
            name=graph.name if graph else str(names.get(key, "")),
            sites=sites,
            tools=_tools(own.tools[own.tools["workflow_hash"] == key], graph, delay_offsets),
            branches=_branches(own.branches[own.branches["workflow_hash"] == key], graph),
            remaining_s=_remaining(own, key),
        )
    table = EstimateTable(workflows=rows, endpoints=dict(endpoints), default_site=default)
    content = json.dumps(table.to_json(), sort_keys=True)
    return replace(table, version=hashlib.sha256(content.encode()).hexdigest()[:12])


def _length_offsets(calls: pd.DataFrame) -> np.ndarray:
    """Return conformal offsets of site quantiles: fitted on earlier runs, scored on later ones."""
    site = calls["workflow_hash"] + "/" + calls["site"]
    late = calls["held_out"].astype(bool)
    early, _ = site_output_tokens(
        {
            str(name): rows.tolist()
            for name, rows in calls.loc[~late, "output_tokens"].groupby(site[~late])
        }
    )
    known = late & site.isin(early)
    return conformal_offsets(
        np.array([early[name].values for name in site[known]]).reshape(-1, len(LEVELS)),
        calls.loc[known, "output_tokens"].to_numpy(float),
        LEVELS,
    )


def _delay_offsets(tools: pd.DataFrame) -> np.ndarray:
    """Return conformal offsets of node delays: fitted on earlier runs, scored on later ones."""
    node = tools["workflow_hash"] + "/" + tools["node"]
    seconds = tools["finish_s"] - tools["start_s"]
    late = tools["held_out"].astype(bool)
    early = {
        str(name): node_delay_s(rows.tolist()).values
        for name, rows in seconds[~late].groupby(node[~late])
    }
    known = late & node.isin(early)
    return conformal_offsets(
        np.array([early[name] for name in node[known]]).reshape(-1, len(LEVELS)),
        seconds[known].to_numpy(float),
        LEVELS,
    )


def _promised(quantiles: Quantiles, offsets: np.ndarray) -> Quantiles:
    values = shifted(np.array([quantiles.values]), offsets)[0]
    return replace(quantiles, values=tuple(map(float, values)))


def _sites(graph: Workflow | None) -> list[CallSite]:
    if graph is None:
        return []
    inner = [site for node in graph.nodes for site in _sites(node.subgraph)]
    return [site for node in graph.nodes for site in node.call_sites] + inner


def _all_branches(graph: Workflow | None) -> list[Branch]:
    if graph is None:
        return []
    inner = [branch for node in graph.nodes for branch in _all_branches(node.subgraph)]
    return [*graph.branches, *inner]


def _site(calls: pd.DataFrame, output: Quantiles, declared: CallSite | None) -> SiteEstimate:
    first = calls[calls["visit"] == 0]
    prompts = first if len(first) else calls
    static = declared.static_prefix_tokens if declared else None
    return SiteEstimate(
        output_tokens=output,
        prompt_tokens=Quantiles.from_samples(prompts["prompt_tokens"]),
        shared_prefix_tokens=_shared_prefix(prompts) if static is None else float(static),
        growth_tokens=_growth(calls),
    )


def _shared_prefix(first: pd.DataFrame) -> float:
    """Tokens that every run shares, read from the caches: what nearly all first-visit hits reach.

    A hit can be longer (the run's own earlier calls) or shorter (evicted), so the low end of the
    hits is taken, and nothing unless a fifth of the calls had one.
    """
    hits = first["cached_tokens"][first["cached_tokens"] > 0]
    if len(hits) < max(5, 0.2 * len(first)):
        return 0.0
    return float(min(np.floor(hits.quantile(0.1)), first["prompt_tokens"].min()))


def _growth(calls: pd.DataFrame) -> Quantiles | None:
    ordered = calls.sort_values(["run", "visit"], kind="stable")
    before = ordered.groupby("run")[["visit", "prompt_tokens", "output_tokens"]].shift(1)
    next_visit = ordered["visit"] == before["visit"] + 1
    fresh = ordered["prompt_tokens"] - before["prompt_tokens"] - before["output_tokens"]
    fresh = fresh[next_visit]
    # Often negative: the site does not append to its last prompt, it starts afresh.
    if len(fresh) < 3 or float((fresh < 0).mean()) > 0.2:
        return None
    return Quantiles.from_samples(fresh.clip(lower=0.0))


def _unseen_site(declared: CallSite, default: SiteEstimate) -> SiteEstimate:
    output = default.output_tokens
    hint = declared.expected_output_tokens
    if hint is not None and output.mean > 0:
        factor = hint / output.mean
        output = Quantiles(
            values=tuple(value * factor for value in output.values),
            mean=hint,
            provenance="declared",
        )
    return replace(
        default,
        output_tokens=output,
        shared_prefix_tokens=float(declared.static_prefix_tokens or 0),
    )


def _tools(
    tools: pd.DataFrame, graph: Workflow | None, offsets: np.ndarray
) -> dict[str, Quantiles]:
    out = {
        str(node): _promised(node_delay_s((rows["finish_s"] - rows["start_s"]).tolist()), offsets)
        for node, rows in tools.groupby("node")
    }
    for node in graph.nodes if graph else ():
        if node.id not in out and node.expected_delay_s is not None:
            out[node.id] = Quantiles.constant(node.expected_delay_s)
    return out


def _branches(
    taken: pd.DataFrame, graph: Workflow | None
) -> dict[str, dict[str, tuple[float, ...]]]:
    declared = {branch.id: branch for branch in _all_branches(graph)}
    out = {}
    for name in sorted({*map(str, taken["branch"]), *declared}):
        mine = taken[taken["branch"] == name]
        priors = {o.id: o.probability for o in declared[name].outcomes} if name in declared else {}
        outcomes = sorted({*map(str, mine["outcome"]), *priors})
        given = [priors.get(outcome) for outcome in outcomes]
        if any(value is None for value in given):
            prior = [1.0 / len(outcomes)] * len(outcomes)
        else:
            prior = [float(value or 0.0) for value in given]
        per_visit = mine["visit"].value_counts()
        last = 0
        while per_visit.get(last + 1, 0) >= LEAST_VISITS:
            last += 1
        visit = mine["visit"].clip(upper=last)
        counts = [
            [float(((visit == at) & (mine["outcome"] == outcome)).sum()) for outcome in outcomes]
            for at in range(last + 1)
        ]
        rows = visit_probabilities(counts, prior)
        out[name] = {
            outcome: tuple(row[position] for row in rows)
            for position, outcome in enumerate(outcomes)
        }
    return out


def _remaining(own: OwnTraces, key: str) -> dict[str, float]:
    """Mean seconds from a node's first start in a run to the end of the run."""
    starts = pd.concat(
        [
            own.calls.loc[own.calls["workflow_hash"] == key, ["run", "node", "ready_s"]].set_axis(
                ["run", "node", "time_s"], axis=1
            ),
            own.tools.loc[own.tools["workflow_hash"] == key, ["run", "node", "start_s"]].set_axis(
                ["run", "node", "time_s"], axis=1
            ),
        ]
    )
    finish = own.runs.drop_duplicates("run").set_index("run")["finish_s"]
    first = starts.groupby(["run", "node"], as_index=False)["time_s"].min()
    left = first["run"].map(finish) - first["time_s"]
    means = left.groupby(first["node"]).mean().dropna().clip(lower=0.0)
    return {str(node): float(value) for node, value in means.items()}
