"""The six-coefficient latency model of one endpoint.

A step of the engine with B decoding calls whose contexts add up to KV tokens, and prefill chunks
of n_i tokens at depth p_i, takes (the "sum" form; alone on an idle engine a prompt of n tokens
costs a + b n + c n^2)

    t = scale * (d + e B + f KV + b sum n_i + c sum n_i (n_i + 2 p_i))     if B > 0
    t = scale * (max(a, d) + b sum n_i + c sum n_i (n_i + 2 p_i))          if B = 0

References
----------
Coefficients as fitted from operator profiles of LLMServingSim and AIConfigurator; the rows of
``data/latency_rows.csv`` name their source one by one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from planner.domain.errors import InvalidInput

__all__ = ["LatencyRow"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyRow:
    """Coefficients of one (model, GPU, tensor parallel size, dtype).

    Parameters
    ----------
    prefill_base_ms
        a: fixed cost of a prefill on an idle engine, ms, >= 0.
    prefill_us_per_token
        b: us per uncached prompt token, >= 0.
    prefill_ns_per_token_sq
        c: ns per squared prompt token (attention), >= 0.
    decode_base_ms
        d: fixed cost of a decode step (weights read once), ms, > 0.
    decode_us_per_call
        e: us per decoding call in the step, >= 0.
    decode_ns_per_kv_token
        f: ns per token of context read in the step, >= 0.
    scale
        Multiplier for this endpoint (calibration, drift, straggler), > 0.
    """

    prefill_base_ms: float
    prefill_us_per_token: float
    prefill_ns_per_token_sq: float
    decode_base_ms: float
    decode_us_per_call: float
    decode_ns_per_kv_token: float
    scale: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0.0 if field.name not in ("decode_base_ms", "scale") else 1e-9
            if not isinstance(value, (int, float)) or not math.isfinite(value) or value < least:
                raise InvalidInput(
                    f"{value!r} is not a number >= {least:g}",
                    where=field.name,
                    remedy="see data/latency_rows.csv for usual sizes",
                )

    @classmethod
    def roofline(
        cls,
        *,
        weight_gb: float,
        parameters_b: float,
        kv_kb_per_token: float,
        bandwidth_gb_s: float,
        tflops: float,
        efficiency: float = 0.6,
    ) -> LatencyRow:
        """Return the row that a GPU's data sheet promises, for an endpoint nothing is known of.

        Parameters
        ----------
        weight_gb, parameters_b
            Weights as stored, GB, and active parameters, billions; over all GPUs.
        kv_kb_per_token
            KV cache of one token, kB.
        bandwidth_gb_s, tflops
            Memory bandwidth, GB/s, and dense compute, TFLOP/s; summed over the GPUs.
        efficiency
            Share of both that is reached, in (0, 1].

        Notes
        -----
        A step reads all weights and each context once; a token costs two operations per
        parameter. The quadratic term is left to be learned. Off by up to a factor of two; meant
        to be corrected by `planner.dispatch.online`.
        """
        read_s = 1.0 / (bandwidth_gb_s * 1e9 * efficiency)
        token_s = 2e9 * parameters_b / (tflops * 1e12 * efficiency)
        step_ms = weight_gb * 1e9 * read_s * 1e3
        return cls(
            prefill_base_ms=step_ms,
            prefill_us_per_token=token_s * 1e6,
            prefill_ns_per_token_sq=0.0,
            decode_base_ms=step_ms,
            decode_us_per_call=token_s * 1e6,
            decode_ns_per_kv_token=kv_kb_per_token * 1e3 * read_s * 1e9,
        )

    def scaled(self, factor: float, *, prefill: float = 1.0, decode: float = 1.0) -> LatencyRow:
        """Return the row ``factor`` times slower, a to c ``prefill`` and d to f ``decode`` times.

        All are > 0.
        """
        return LatencyRow(
            prefill_base_ms=self.prefill_base_ms * prefill,
            prefill_us_per_token=self.prefill_us_per_token * prefill,
            prefill_ns_per_token_sq=self.prefill_ns_per_token_sq * prefill,
            decode_base_ms=self.decode_base_ms * decode,
            decode_us_per_call=self.decode_us_per_call * decode,
            decode_ns_per_kv_token=self.decode_ns_per_kv_token * decode,
            scale=self.scale * factor,
        )

    def prefill_s(self, tokens: float, depth: float = 0.0) -> float:
        """Seconds to prefill ``tokens`` uncached tokens after ``depth`` cached ones, alone."""
        work = self.prefill_us_per_token * 1e-6 * tokens
        work += self.prefill_ns_per_token_sq * 1e-9 * tokens * (tokens + 2.0 * depth)
        return self.scale * (self.prefill_base_ms * 1e-3 + work)

    def prefill_marginal_s(self, tokens: float, depth: float = 0.0) -> float:
        """Seconds that a prefill of ``tokens`` adds to steps that run anyway."""
        work = self.prefill_us_per_token * 1e-6 * tokens
        work += self.prefill_ns_per_token_sq * 1e-9 * tokens * (tokens + 2.0 * depth)
        return self.scale * work

    def decode_step_s(self, calls: float, kv_tokens: float) -> float:
        """Seconds of a decode-only step with ``calls`` calls and ``kv_tokens`` of context."""
        return self.scale * (
            self.decode_base_ms * 1e-3
            + self.decode_us_per_call * 1e-6 * calls
            + self.decode_ns_per_kv_token * 1e-9 * kv_tokens
        )
