"""The workflows of the studies: graphs with the distributions that realise their runs.

All lengths and delays are lognormal with heavy tails. Lengths are in tokens, delays in seconds;
each is given by its mean. Sizes follow what public agent traces show in order of magnitude (agents
with prompts of thousands of tokens that grow by tool results, answers of 50 to 600 tokens, tools
from tenths of a second to half a minute); they are a model, not a recording.

Limits of the form: the children of a tree search share a static prefix and each its own growing
text, not the text of their parent; a fan-out is a choice among a few widths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from planner.domain.estimates import Quantiles, SiteEstimate, WorkflowEstimate
from planner.domain.ids import NodeId, SiteId
from planner.domain.workflow import END, START, Branch, CallSite, Node, Outcome, Workflow
from planner.study.lengths import lognormal, mixture

__all__ = ["TEMPLATES", "Template"]

MODEL_LEN = 32_000
"""No prompt or answer part is longer, so that a call fits every fleet's KV."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """A workflow and its truth.

    Parameters
    ----------
    truth
        Marginal distributions.
    classes
        (share, truth) of kinds of runs that differ in all their lengths together, which makes the
        lengths of a run's stages correlated; empty if they are independent.
    """

    workflow: Workflow
    truth: WorkflowEstimate
    classes: tuple[tuple[float, WorkflowEstimate], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """A call site: mean lengths in tokens; ``growth`` is fresh text on a later visit."""

    static: int
    fresh: float
    output: float
    growth: float | None = None
    sigma: float = 0.7
    prefix: str = ""


_Choices = Mapping[str, Mapping[str, tuple[tuple[str, ...], tuple[float, ...]]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sketch:
    """A workflow in short: calls, tools as (mean s, sigma), edges "a>b", choices by node.

    A choice maps an outcome to (targets, probabilities by visit).
    """

    name: str
    calls: Mapping[str, _Call]
    tools: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    code: tuple[str, ...] = ()
    edges: str = ""
    choices: _Choices = field(default_factory=dict)

    def workflow(self) -> Workflow:
        nodes = [
            Node(
                id=NodeId(name),
                kind="llm",
                call_sites=(
                    CallSite(
                        id=SiteId(f"{name}#0"),
                        static_prefix_hash=f"{self.name}/{call.prefix or name}",
                        static_prefix_tokens=call.static,
                    ),
                ),
            )
            for name, call in self.calls.items()
        ]
        nodes += [Node(id=NodeId(name), kind="tool") for name in self.tools]
        nodes += [Node(id=NodeId(name), kind="code") for name in self.code]
        names = {"start": START, "end": END}
        pairs = [edge.split(">") for edge in self.edges.split()]
        return Workflow(
            name=self.name,
            nodes=tuple(nodes),
            edges=tuple((names.get(a, NodeId(a)), names.get(b, NodeId(b))) for a, b in pairs),
            branches=tuple(
                Branch(
                    id=f"{source}:next",
                    source=NodeId(source),
                    outcomes=tuple(
                        Outcome(id=one, targets=tuple(names.get(t, NodeId(t)) for t in targets))
                        for one, (targets, _) in outcomes.items()
                    ),
                )
                for source, outcomes in self.choices.items()
            ),
        )

    def truth(self, scale: float = 1.0) -> WorkflowEstimate:
        """Return the distributions, with fresh text and answers ``scale`` times as long."""

        def length(mean: float, sigma: float) -> Quantiles:
            return lognormal(scale * mean, sigma, MODEL_LEN / 8)

        return WorkflowEstimate(
            name=self.name,
            sites={
                f"{name}#0": SiteEstimate(
                    output_tokens=length(call.output, call.sigma),
                    prompt_tokens=_Shifted.of(length(call.fresh, call.sigma), call.static),
                    shared_prefix_tokens=float(call.static),
                    growth_tokens=None if call.growth is None else length(call.growth, call.sigma),
                )
                for name, call in self.calls.items()
            },
            tools={name: lognormal(*delay) for name, delay in self.tools.items()},
            branches={
                f"{source}:next": {one: chances for one, (_, chances) in outcomes.items()}
                for source, outcomes in self.choices.items()
            },
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shifted(Quantiles):
    """A distribution plus a constant: fresh text after a static prefix."""

    fresh: Quantiles
    shift: float

    @classmethod
    def of(cls, fresh: Quantiles, shift: float) -> _Shifted:
        return cls(
            values=tuple(value + shift for value in fresh.values),
            mean=fresh.mean + shift,
            provenance=fresh.provenance,
            fresh=fresh,
            shift=shift,
        )

    def sample(self, uniform: float) -> float:
        return self.fresh.sample(uniform) + self.shift


def _until(visits: int, first: float, later: float, last: float) -> tuple[float, ...]:
    """Return the probabilities of an outcome of a loop that ends with its visit number ``visits``.

    Loops are geometric up to there; the limit keeps a call within a scarce KV cache.
    """
    return (first, *([later] * (visits - 2)), last)


_RAG = _Sketch(
    name="rag",
    calls={
        "triage": _Call(static=600, fresh=200, output=60),
        "answer": _Call(static=600, fresh=900, output=220),
        "facts": _Call(static=700, fresh=1500, output=200),
        "numbers": _Call(static=700, fresh=1100, output=140),
        "risks": _Call(static=700, fresh=1300, output=260),
        "draft": _Call(static=600, fresh=1200, output=420, growth=250),
        "critic": _Call(static=500, fresh=800, output=90),
    },
    tools={"retrieve": (0.4, 0.6), "search": (1.2, 0.9)},
    edges="start>triage retrieve>answer answer>end search>facts search>numbers search>risks "
    "facts>draft numbers>draft risks>draft draft>critic",
    choices={
        "triage": {"simple": (("retrieve",), (0.45,)), "deep": (("search",), (0.55,))},
        "critic": {"accept": (("end",), (0.6, 0.8, 1.0)), "revise": (("draft",), (0.4, 0.2, 0.0))},
    },
)
_REACT = _Sketch(
    name="react",
    calls={"agent": _Call(static=1500, fresh=300, output=120, growth=450)},
    tools={"search": (1.5, 0.9), "code": (4.0, 1.0), "read": (0.3, 0.6)},
    edges="start>agent search>agent code>agent read>agent",
    choices={
        "agent": {
            "search": (("search",), _until(20, 0.45, 0.35, 0.0)),
            "code": (("code",), _until(20, 0.2, 0.25, 0.0)),
            "read": (("read",), _until(20, 0.3, 0.2, 0.0)),
            "finish": (("end",), _until(20, 0.05, 0.2, 1.0)),
        }
    },
)
_EXTRACTION = _Sketch(
    name="extraction",
    calls={
        "extract": _Call(static=800, fresh=2200, output=180),
        "repair": _Call(static=400, fresh=700, output=160),
    },
    code=("validate",),
    edges="start>extract extract>validate repair>end",
    choices={"validate": {"ok": (("end",), (0.85,)), "broken": (("repair",), (0.15,))}},
)
_WIDTHS = {4: 0.3, 6: 0.3, 8: 0.25, 12: 0.15}
_MAPREDUCE = _Sketch(
    name="mapreduce",
    calls={
        "plan": _Call(static=400, fresh=1500, output=150),
        **{
            f"map{n}": _Call(static=300, fresh=1600, output=180, prefix="map")
            for n in range(max(_WIDTHS))
        },
        "reduce": _Call(static=400, fresh=1800, output=550),
    },
    edges=" ".join(["start>plan", *(f"map{n}>reduce" for n in range(12)), "reduce>end"]),
    choices={
        "plan": {
            f"w{width:02d}": (tuple(f"map{n}" for n in range(width)), (share,))
            for width, share in _WIDTHS.items()
        }
    },
)
_TREE = _Sketch(
    name="tree",
    calls={
        "root": _Call(static=800, fresh=400, output=120),
        **{
            f"child{n}": _Call(static=800, fresh=600, output=150, growth=250, prefix="child")
            for n in range(5)
        },
        "judge": _Call(static=500, fresh=1200, output=80),
        "answer": _Call(static=400, fresh=1000, output=280),
    },
    edges=" ".join(
        [
            "start>root",
            *(f"root>child{n} child{n}>judge" for n in range(5)),
            "answer>end",
        ]
    ),
    choices={
        "judge": {
            "deeper": (tuple(f"child{n}" for n in range(5)), (0.95, 0.85, 0.0)),
            "done": (("answer",), (0.05, 0.15, 1.0)),
        }
    },
)
_TOOL_HEAVY = _Sketch(
    name="tool_heavy",
    calls={"agent": _Call(static=2500, fresh=800, output=150, growth=900)},
    tools={"shell": (6.0, 1.1), "test": (20.0, 1.1), "browse": (4.0, 0.9), "edit": (0.5, 0.5)},
    edges="start>agent shell>agent test>agent browse>agent edit>agent",
    choices={
        "agent": {
            "shell": (("shell",), _until(20, 0.4, 0.35, 0.0)),
            "test": (("test",), _until(20, 0.1, 0.2, 0.0)),
            "browse": (("browse",), _until(20, 0.3, 0.1, 0.0)),
            "edit": (("edit",), _until(20, 0.2, 0.25, 0.0)),
            "finish": (("end",), _until(20, 0.0, 0.1, 1.0)),
        }
    },
)
_CHAT = _Sketch(
    name="chat",
    calls={"turn": _Call(static=200, fresh=250, output=230, growth=70)},
    tools={"user": (12.0, 1.0)},
    edges="start>turn user>turn",
    choices={
        "turn": {
            "again": (("user",), _until(20, 0.72, 0.72, 0.0)),
            "leave": (("end",), _until(20, 0.28, 0.28, 1.0)),
        }
    },
)
_CLASSES = ((0.65, 0.5), (0.35, 1.93))
"""(share, scale of lengths) of the runs of ``staged``; the mean scale is one."""
_STAGED = _Sketch(
    name="staged",
    calls={
        "plan": _Call(static=400, fresh=500, output=140, sigma=0.35),
        "outline": _Call(static=400, fresh=600, output=220, sigma=0.35),
        "write": _Call(static=400, fresh=900, output=500, sigma=0.35),
        "review": _Call(static=400, fresh=900, output=160, sigma=0.35),
    },
    edges="start>plan plan>outline outline>write write>review review>end",
)


def _varied_tools(sketch: _Sketch, name: str, cv: float) -> _Sketch:
    """Return the workflow with tools of the same means and another coefficient of variation."""
    sigma = math.sqrt(math.log1p(cv * cv))
    tools = {tool: (mean_s, sigma) for tool, (mean_s, _) in sketch.tools.items()}
    return replace(sketch, name=name, tools=tools)


_CVS = (0.5, 1.0, 3.0)


def _independent(sketch: _Sketch) -> Template:
    return Template(workflow=sketch.workflow(), truth=sketch.truth())


def _correlated(sketch: _Sketch, *, shuffled: bool) -> Template:
    """Return runs of two sizes; ``shuffled`` gives every stage its size anew."""
    parts = tuple((share, sketch.truth(scale)) for share, scale in _CLASSES)
    shares = [share for share, _ in parts]

    def marginal(pick: str, site: str) -> Quantiles:
        return mixture(shares, [getattr(truth.sites[site], pick) for _, truth in parts])

    first = parts[0][1]
    truth = WorkflowEstimate(
        name=sketch.name,
        sites={
            site: SiteEstimate(
                output_tokens=marginal("output_tokens", site),
                prompt_tokens=marginal("prompt_tokens", site),
                shared_prefix_tokens=one.shared_prefix_tokens,
            )
            for site, one in first.sites.items()
        },
        tools=first.tools,
        branches=first.branches,
    )
    workflow = sketch.workflow()
    return Template(workflow=workflow, truth=truth, classes=() if shuffled else parts)


TEMPLATES: Mapping[str, Template] = {
    **{
        sketch.name: _independent(sketch)
        for sketch in (
            *(_RAG, _REACT, _EXTRACTION, _MAPREDUCE, _TREE, _TOOL_HEAVY, _CHAT),
            *(_varied_tools(_TOOL_HEAVY, f"tools_cv{cv:g}", cv) for cv in _CVS),
        )
    },
    "staged": _correlated(_STAGED, shuffled=False),
    "staged_shuffled": _correlated(_STAGED, shuffled=True),
}
"""Workflows by name. ``staged`` has runs whose stages are all short or all long, and
``staged_shuffled`` the same marginals without that. ``tools_cv1`` is ``tool_heavy`` with tools of
coefficient of variation 1, and so on."""
