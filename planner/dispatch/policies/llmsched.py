"""LLMSched: shortest expected remaining work, and now and then what tells most.

Stages are the calls and tools of an application by visit. Per application a Bayesian network over
their durations is learned from runs that have ended; a run's finished stages are its evidence.
Each pass over the queue tosses a coin: with probability epsilon the calls go by the uncertainty
that their end would take away, otherwise by the expected remaining work of their runs.

References
----------
LLMSched (arXiv 2504.03444). The full text was not available to us: mutual information times
ranges, the two orders and the coin follow readers' notes; bins, the tree as the network's shape
and ABSENT are reconstruction.

Deviations: a stage is one call, so the sampled fraction of explored stages is all of it; a call's
duration is that of its real lengths on the best idle endpoint, so that the endpoints it happened
to get do not blur the profile; branches count through the stages they leave out; placement is by
least expected finish, where the paper balances load over alike executors.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence

import numpy as np

from planner.dispatch.events import Call, Event, RunEnded, ToolFinished, ToolStarted
from planner.dispatch.policies.bayes import Posterior, StageNetwork
from planner.dispatch.policies.placement import service_s
from planner.dispatch.policies.progress import Ended
from planner.dispatch.policies.queued import QueuedPolicy
from planner.dispatch.view import FleetView

__all__ = ["LlmSched", "stage_of"]

_KEPT_RUNS = 200
_REFIT_RUNS = 10
_KEPT_POSTERIORS = 4096


def stage_of(call: Call) -> str:
    """Return the stage of a call: its site and visit."""
    return f"{call.site}/{call.visit}"


class _Profile:
    """The runs of one application, and the network fitted to them."""

    def __init__(self) -> None:
        self.runs: deque[dict[str, float]] = deque(maxlen=_KEPT_RUNS)
        self.network: StageNetwork | None = None
        self._fresh = 0

    def add(self, durations: dict[str, float], bins: int, least: int) -> bool:
        """Take in a run that has ended; return whether the network was fitted anew."""
        self.runs.append(durations)
        self._fresh += 1
        if len(self.runs) < least or (self.network is not None and self._fresh < _REFIT_RUNS):
            return False
        self._fresh = 0
        self.network = StageNetwork(self.runs, bins=bins)
        return True


class LlmSched(QueuedPolicy):
    """Expected remaining work and uncertainty reduction, see the module.

    Parameters
    ----------
    epsilon
        Probability of exploring, [0, 1].
    bins
        Duration bins per stage, >= 1.
    least_runs
        Runs of an application before it has a profile, >= 1. Until then its runs go first, older
        ones before younger: nothing is known of them, and they are what it is learned from.
    seed
        Of the coin.
    """

    name = "llmsched"

    def __init__(
        self, *, epsilon: float = 0.2, bins: float = 5, least_runs: float = 20, seed: int = 0
    ) -> None:
        super().__init__()
        self.epsilon = epsilon
        self.bins = max(1, int(bins))
        self.least_runs = max(1, int(least_runs))
        self._rng = np.random.default_rng(seed)
        self._profiles: dict[str, _Profile] = {}
        self._done: dict[str, dict[str, float]] = {}  # run -> stage -> seconds
        self._tools: dict[tuple[str, str], tuple[int, float]] = {}  # visits so far, start
        self._posteriors: OrderedDict[tuple[str, tuple[tuple[str, int], ...]], Posterior] = (
            OrderedDict()
        )
        self._beliefs: dict[str, Posterior | None] = {}  # of runs, while nothing new is known
        self._explores = False

    # -- learning -----------------------------------------------------------------------------

    def observe(self, event: Event, fleet: FleetView) -> None:
        """Follow stages; learn from runs that have ended."""
        if isinstance(event, RunEnded):
            self._learn(event.run_id)
        super().observe(event, fleet)
        if isinstance(event, ToolStarted):
            visits, _ = self._tools.get((event.run_id, event.node), (0, 0.0))
            self._tools[event.run_id, event.node] = visits + 1, event.now_s
        elif isinstance(event, ToolFinished):
            visits, start_s = self._tools.get((event.run_id, event.node), (1, event.now_s))
            self._over(event.run_id, f"{event.node}/{visits - 1}", event.now_s - start_s)

    def ended(self, ended: Ended, now_s: float) -> None:  # noqa: ARG002 - the signature
        """Note how much work a call has been."""
        call = ended.call
        if self.fleet is not None and call.run_id:
            tokens = max(1, ended.output_tokens)
            seconds = service_s(call.prompt_tokens, tokens, self.fleet.states, call.model)
            self._over(call.run_id, stage_of(call), seconds)

    def _over(self, run_id: str, stage: str, seconds: float) -> None:
        self._done.setdefault(run_id, {})[stage] = seconds
        self._beliefs.pop(run_id, None)

    def _learn(self, run_id: str) -> None:
        done = self._done.pop(run_id, None)
        self._beliefs.pop(run_id, None)
        for key in [key for key in self._tools if key[0] == run_id]:
            del self._tools[key]
        run = self.runs.get(run_id)
        if run is None or not done:
            return
        profile = self._profiles.setdefault(run.workflow_hash, _Profile())
        if profile.add(done, self.bins, self.least_runs):
            self._beliefs.clear()
            for known in [known for known in self._posteriors if known[0] == run.workflow_hash]:
                del self._posteriors[known]

    def belief(self, call: Call) -> Posterior | None:
        """Return what is believed of a call's run, or None without a profile."""
        run_id = call.run_id
        if not run_id or run_id not in self._beliefs:
            profile = self._profiles.get(call.workflow_hash)
            network = None if profile is None else profile.network
            found = None if network is None else self._posterior(call, network)
            if not run_id:
                return found
            self._beliefs[run_id] = found
        return self._beliefs[run_id]

    def _posterior(self, call: Call, network: StageNetwork) -> Posterior:
        evidence = {
            stage: network.state(stage, seconds)
            for stage, seconds in self._done.get(call.run_id, {}).items()
            if stage in network.seconds
        }
        key = call.workflow_hash, tuple(sorted(evidence.items()))
        found = self._posteriors.get(key)
        if found is None:
            found = self._posteriors[key] = network.posterior(evidence)
            if len(self._posteriors) > _KEPT_POSTERIORS:
                self._posteriors.popitem(last=False)
        return found

    # -- order --------------------------------------------------------------------------------

    def ranked(self, held: Sequence[Call], now_s: float) -> Iterable[Call]:
        """Toss the coin, and return the waiting calls by one of the two orders."""
        self._explores = bool(self._rng.random() < self.epsilon)
        return super().ranked(held, now_s)

    def key(self, call: Call, now_s: float) -> tuple[float, float]:  # noqa: ARG002 - no ageing
        """Return the remaining work, or minus the uncertainty reduction; then the run's arrival."""
        belief = self.belief(call)
        if belief is None:
            return -float("inf"), call.run_arrival_s
        if self._explores:
            return -belief.reduction(stage_of(call)), call.run_arrival_s
        return belief.left_s(), call.run_arrival_s
