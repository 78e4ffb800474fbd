"""vLLM's own metrics, by its names, types and buckets, in engine seconds."""

from __future__ import annotations

from itertools import takewhile

from planner.domain.fleet import Endpoint
from planner.sim.engine import Engine, EngineRequest
from runtime.prometheus import Counter, Gauge, Histogram, Registry

__all__ = ["EngineMetrics"]

_TTFT_S = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
    80, 160, 640, 2560,
)  # fmt: skip
_ITL_S = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
_REQUEST_S = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
_LABELS = ("model_name", "engine")


def _sizes(most: int) -> tuple[float, ...]:
    """Return vLLM's 1-2-5 series up to ``most``."""
    series = (float(m * 10**e) for e in range(10) for m in (1, 2, 5))
    return tuple(takewhile(lambda size: size <= most, series))


class EngineMetrics:
    """Metrics of one endpoint.

    Parameters
    ----------
    endpoint
        Labels and limits.
    engine
        Read for gauges and counters at each scrape.
    """

    def __init__(self, endpoint: Endpoint, engine: Engine) -> None:
        self._engine = engine
        self._of = (endpoint.model, "0")
        sizes = _sizes(endpoint.max_model_len)

        def histogram(name: str, help_: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"vllm:{name}", help_, buckets, _LABELS)

        self._gauges = {
            name: Gauge(f"vllm:{name}", help_, _LABELS)
            for name, help_ in (
                ("num_requests_running", "Number of requests in model execution batches."),
                ("num_requests_waiting", "Number of requests waiting to be processed."),
                ("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage."),
            )
        }
        self._counters = {
            name: Counter(f"vllm:{name}_total", help_, _LABELS)
            for name, help_ in (
                ("prefix_cache_queries", "Prefix cache queries, in tokens."),
                ("prefix_cache_hits", "Prefix cache hits, in tokens."),
                ("prompt_tokens", "Number of prefill tokens processed."),
                ("generation_tokens", "Number of generation tokens processed."),
                ("num_preemptions", "Cumulative number of preemptions from the engine."),
            )
        }
        self._success = Counter(
            "vllm:request_success_total",
            "Count of successfully processed requests.",
            (*_LABELS, "finished_reason"),
        )
        self._ttft = histogram("time_to_first_token_seconds", "Time to first token.", _TTFT_S)
        self._itl = histogram("inter_token_latency_seconds", "Inter-token latency.", _ITL_S)
        self._tpot = histogram(
            "request_time_per_output_token_seconds", "Mean time per output token.", _ITL_S
        )
        self._e2e = histogram("e2e_request_latency_seconds", "End-to-end latency.", _REQUEST_S)
        self._queue = histogram("request_queue_time_seconds", "Time in WAITING.", _REQUEST_S)
        self._prefill = histogram("request_prefill_time_seconds", "Time in PREFILL.", _REQUEST_S)
        self._decode = histogram("request_decode_time_seconds", "Time in DECODE.", _REQUEST_S)
        self._inference = histogram(
            "request_inference_time_seconds", "Time in RUNNING.", _REQUEST_S
        )
        self._prompt = histogram("request_prompt_tokens", "Prefill tokens processed.", sizes)
        self._output = histogram("request_generation_tokens", "Generation tokens.", sizes)
        info = Gauge(
            "vllm:cache_config_info",
            "Information of the LLMEngine CacheConfig",
            ("block_size", "num_gpu_blocks", "enable_prefix_caching", "engine"),
        )
        info.set(1, str(endpoint.block_tokens), str(endpoint.kv_blocks), "True", "0")
        self._registry = Registry(
            (
                *self._gauges.values(), *self._counters.values(), self._success, self._ttft,
                self._itl, self._tpot, self._e2e, self._queue, self._inference, self._prefill,
                self._decode, self._prompt, self._output, info,
            )
        )  # fmt: skip

    def tokens(self, count: int, gap_s: float | None) -> None:
        """Count a hand-out of tokens ``gap_s`` after the one before."""
        if gap_s is not None:
            self._itl.observe(gap_s, *self._of, count=count)

    def ended(self, request: EngineRequest, reason: str, now_s: float) -> None:
        """Count a request that ended with ``stop``, ``length``, ``abort`` or ``error``."""
        of = self._of
        self._success.inc(*of, reason)
        scheduled_s, first_s = request.first_scheduled_s, request.first_token_s
        end_s = now_s if request.finish_s is None else request.finish_s
        self._e2e.observe(end_s - request.arrival_s, *of)
        self._prompt.observe(request.prompt_tokens, *of)
        self._output.observe(request.generated_tokens, *of)
        if scheduled_s is None:
            return
        self._queue.observe(max(0.0, scheduled_s - request.arrival_s), *of)
        self._inference.observe(end_s - scheduled_s, *of)
        if first_s is None:
            return
        self._ttft.observe(first_s - request.arrival_s, *of)
        self._prefill.observe(first_s - scheduled_s, *of)
        self._decode.observe(end_s - first_s, *of)
        if request.generated_tokens > 1:
            self._tpot.observe((end_s - first_s) / (request.generated_tokens - 1), *of)

    def render(self) -> str:
        """Return the exposition text as of the last step."""
        engine, of = self._engine, self._of
        self._gauges["num_requests_running"].set(engine.num_running, *of)
        self._gauges["num_requests_waiting"].set(engine.num_waiting, *of)
        self._gauges["kv_cache_usage_perc"].set(engine.kv_usage, *of)
        for name, value in (
            ("prefix_cache_queries", engine.prefix_queries_total),
            ("prefix_cache_hits", engine.prefix_hits_total),
            ("prompt_tokens", engine.prompt_tokens_total),
            ("generation_tokens", engine.generation_tokens_total),
            ("num_preemptions", engine.preemptions_total),
        ):
            self._counters[name].set(value, *of)
        return self._registry.render()
