"""What comes next in a sequence: a variable-order model with Dirichlet back-off.

For agents without a graph. A context is the last k symbols, k = 0 up to an order; its counts are
pulled to the probabilities of the context one symbol shorter. Where a long context says nothing
new it falls back on the shorter one by itself, so the order needs no tuning.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Self

__all__ = ["END_SYMBOL", "START_SYMBOL", "SequenceModel"]

START_SYMBOL, END_SYMBOL = "(start)", "(end)"

Context = tuple[str, ...]


class SequenceModel:
    """Probabilities of the next symbol given those before it.

    Parameters
    ----------
    order
        Longest context in symbols, >= 1.
    strength
        Weight of the shorter context in observations, > 0.

    Attributes
    ----------
    symbols_ : tuple of str
        All symbols that can come next, the end among them, sorted.
    counts_ : dict of context to Counter
        What followed each context; a context is in order of time and may begin with the start.

    Notes
    -----
    ``p(s | c) = (n(c, s) + strength p(s | shorter c)) / (n(c) + strength)``, down to the uniform
    distribution with a weight of one observation: the posterior mean under Dirichlet priors
    centred on the shorter context (MacKay and Peto, 1995).
    """

    def __init__(self, order: int = 3, strength: float = 5.0) -> None:
        self.order = order
        self.strength = strength

    def fit(self, sequences: Iterable[Sequence[str]]) -> Self:
        """Fit on sequences of symbols; each ends with the end, which is not to be given."""
        self.counts_: dict[Context, Counter[str]] = {}
        symbols = {END_SYMBOL}
        for sequence in sequences:
            path = (START_SYMBOL, *sequence, END_SYMBOL)
            symbols.update(sequence)
            for place in range(1, len(path)):
                for length in range(min(self.order, place) + 1):
                    context = path[place - length : place]
                    self.counts_.setdefault(context, Counter())[path[place]] += 1
        self.symbols_ = tuple(sorted(symbols))
        return self

    def probabilities(self, history: Sequence[str]) -> dict[str, float]:
        """Return the probability of each symbol after a history (from the sequence's start).

        All are > 0 and they sum to one; a symbol never seen in training is not among them.
        """
        path = (START_SYMBOL, *history)
        found = dict.fromkeys(self.symbols_, 1.0 / len(self.symbols_))
        for length in range(min(self.order, len(path)) + 1):
            counts = self.counts_.get(path[len(path) - length :])
            if counts is None:
                break
            weight = self.strength if length else 1.0
            total = counts.total() + weight
            found = {
                symbol: (counts[symbol] + weight * value) / total for symbol, value in found.items()
            }
        return found

    def informative_contexts(self, least: int = 10, gain_nats: float = 4.0) -> set[Context]:
        """Return the contexts longer than one symbol worth a state of their own.

        Parameters
        ----------
        least
            Times it was seen.
        gain_nats
            Log likelihood its own probabilities gain over the shorter context's on what followed
            it: ``n(c) KL(p(. | c) || p(. | shorter c))``. Four nats are about the 0.05 level of a
            likelihood ratio with three outcomes.
        """
        kept: set[Context] = set()
        for context, counts in sorted(self.counts_.items(), key=lambda item: len(item[0])):
            if len(context) < 2 or counts.total() < least:
                continue
            shorter = self.counts_[context[1:]]
            gain = sum(
                seen * math.log((seen / counts.total()) / (shorter[symbol] / shorter.total()))
                for symbol, seen in counts.items()
            )
            if gain >= gain_nats:
                # A state is only reached through the shorter ones, so these are states, too.
                kept.update(context[place:] for place in range(len(context) - 1))
        return kept
