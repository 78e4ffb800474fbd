"""When to stop sending to an endpoint, and when to try it again.

A failed connect closes an endpoint at once; answers of 5xx and broken streams close it after
several in a row, so that an endpoint that fails fast does not attract load. It is opened again
by a health probe, at the earliest after a pause. Answers of 4xx are the client's fault and count
for nothing.
"""

from __future__ import annotations

__all__ = ["Breaker"]


class Breaker:
    """The state of one endpoint; times are wall seconds.

    Parameters
    ----------
    failures
        Consecutive failures that close it, >= 1.
    pause_s
        Least time down before a probe may bring it back, >= 0; doubles with each time down
        without a success in between, up to 32 times.

    Attributes
    ----------
    down
        Whether nothing may be sent.
    cold
        Whether it could not be reached when it went down, so its cache is probably lost.
    """

    __slots__ = ("_failures", "_limit", "_pause_s", "_retry_at_s", "_times_down", "cold", "down")

    def __init__(self, *, failures: int = 3, pause_s: float = 1.0) -> None:
        self._limit = failures
        self._pause_s = pause_s
        self._failures = 0
        self._times_down = 0
        self._retry_at_s = 0.0
        self.down = False
        self.cold = False

    def success(self) -> None:
        """Note a good answer."""
        self._failures = 0
        self._times_down = 0

    def failure(self, now_s: float, *, unreachable: bool = False) -> bool:
        """Note a failure; return whether it takes the endpoint down just now."""
        self._failures += 1
        if self.down or not (unreachable or self._failures >= self._limit):
            return False
        self.down = True
        self.cold = unreachable
        self._retry_at_s = now_s + self._pause_s * 2 ** min(self._times_down, 5)
        self._times_down += 1
        return True

    def may_probe(self, now_s: float) -> bool:
        """Return whether an endpoint that is down may be probed now."""
        return self.down and now_s >= self._retry_at_s

    def pause_left_s(self, now_s: float) -> float:
        """Return how long it is until it may be probed, >= 0."""
        return max(0.0, self._retry_at_s - now_s) if self.down else 0.0

    def recovered(self) -> None:
        """Note a good probe."""
        self.down = False
        # One more failure is enough to close it again until an answer succeeds.
        self._failures = self._limit - 1
