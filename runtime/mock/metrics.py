"""vLLM's own metrics, by its names, types and buckets, in engine seconds.

Gauges are what they were at the end of the last step, as in vLLM: a scrape sees no queue that
grows while the engine does not step.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path

from planner.domain.fleet import Endpoint
from planner.sim.engine import Engine, EngineRequest
from runtime.mock.pacing import Answer
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
_STEP_TOKENS = (1, 8, *(2**power for power in range(4, 15)))
_CHOICES = (1, 2, 5, 10, 20)
_PREEMPTIONS = (1, 2, 3, 4, 5, 10, 20)
_TRANSFER_S = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 5)  # of nixl metrics
_TRANSFER_BYTES = tuple(2.0**power for power in range(11, 39, 3))
_HTTP_S = (0.1, 0.5, 1)
_LABELS = ("model_name", "engine")
_REASONS = ("stop", "length", "abort", "error", "repetition")
_SOURCES = ("local_compute", "local_cache_hit", "external_kv_transfer")
_WAITS = ("capacity", "deferred")
_SLEEP = ("awake", "weights_offloaded", "discard_all")


def _sizes(most: int) -> tuple[float, ...]:
    """Return vLLM's 1-2-5 series up to ``most``."""
    series = (float(m * 10**e) for e in range(10) for m in (1, 2, 5))
    return tuple(takewhile(lambda size: size <= most, series))


class EngineMetrics:
    """Metrics of one endpoint; a `runtime.mock.pacing.Listener`.

    Parameters
    ----------
    endpoint
        Labels and limits.
    engine
        Read for gauges and counters after each step.
    lora
        Names of adapters; without any there are no metrics of them.
    old_names
        Expose the names of 0.10.2, too.

    Attributes
    ----------
    deferred, hidden
        Waiting requests of the engine that wait for KV from elsewhere, and that nobody sent.
    sleep_level
        0 awake, 1 or 2 asleep.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        engine: Engine,
        *,
        lora: tuple[str, ...] = (),
        old_names: bool = False,
    ) -> None:
        self._engine = engine
        self._of = of = (endpoint.model, "0")
        self._lora = lora
        self._loras_live: dict[str, int] = {}
        self._prompt_tokens = 0
        self._external: dict[str, int] = {}  # request -> tokens pulled
        self.deferred = 0
        self.hidden = 0
        self.sleep_level = 0
        sizes = _sizes(endpoint.max_model_len)

        def gauge(name: str, help_: str, *labels: str) -> Gauge:
            return Gauge(f"vllm:{name}", help_, (*_LABELS, *labels))

        def counter(name: str, help_: str, *labels: str, values: Iterable[str] = ()) -> Counter:
            made = Counter(f"vllm:{name}_total", help_, (*_LABELS, *labels))
            for value in values if labels else ("",):
                made.set(0, *of, *((value,) if labels else ()))
            return made

        def histogram(name: str, help_: str, buckets: Iterable[float]) -> Histogram:
            made = Histogram(f"vllm:{name}", help_, tuple(buckets), _LABELS)
            made.observe(0.0, *of, count=0)
            return made

        self._running = gauge(
            "num_requests_running", "Number of requests in model execution batches."
        )
        self._waiting = gauge("num_requests_waiting", "Number of requests waiting to be processed.")
        self._waiting_by = gauge(
            "num_requests_waiting_by_reason", "Number of waiting requests by reason.", "reason"
        )
        self._usage = gauge("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.")
        self._sleep = gauge("engine_sleep_state", "Engine sleep state.", "sleep_state")
        self._adapters = Gauge(
            "vllm:lora_requests_info",
            "Running stats on lora requests.",
            ("max_lora", "waiting_lora_adapters", "running_lora_adapters"),
        )
        info = {
            "block_size": str(endpoint.block_tokens),
            "cache_dtype": "auto",
            "enable_prefix_caching": str(engine.config.prefix_caching),
            "gpu_memory_utilization": "0.9",
            "num_gpu_blocks": str(engine.config.kv_blocks),
            "sliding_window": "None",
        }
        self._info = Gauge(
            "vllm:cache_config_info",
            "Information of the LLMEngine CacheConfig",
            (*info, *_LABELS),
        )
        self._info.set(1, *info.values(), *of)

        self._totals = {
            name: counter(name, help_)
            for name, help_ in (
                ("prefix_cache_queries", "Prefix cache queries, in tokens."),
                ("prefix_cache_hits", "Prefix cache hits, in tokens."),
                ("external_prefix_cache_queries", "External prefix cache queries, in tokens."),
                ("external_prefix_cache_hits", "External prefix cache hits, in tokens."),
                ("mm_cache_queries", "Multi-modal cache queries, in items."),
                ("mm_cache_hits", "Multi-modal cache hits, in items."),
                ("num_preemptions", "Cumulative number of preemptions from the engine."),
                ("prompt_tokens", "Number of prefill tokens processed."),
                ("prompt_tokens_cached", "Number of cached prompt tokens."),
                ("generation_tokens", "Number of generation tokens processed."),
                ("nixl_num_kv_expired_reqs", "Requests whose KV lease ran out."),
                ("nixl_num_failed_transfers", "Failed KV transfers."),
            )
        }
        self._by_source = counter(
            "prompt_tokens_by_source", "Prompt tokens by source.", "source", values=_SOURCES
        )
        self._success = counter(
            "request_success", "Count of successfully processed requests.", "finished_reason",
            values=_REASONS,
        )  # fmt: skip
        self._rejected = counter(
            "admission_rejections", "Requests refused at admission.", "reason",
            values=("max_num_queued_reqs",),
        )  # fmt: skip

        self._ttft = histogram("time_to_first_token_seconds", "Time to first token.", _TTFT_S)
        self._itl = histogram("inter_token_latency_seconds", "Inter-token latency.", _ITL_S)
        self._tpot = histogram(
            "request_time_per_output_token_seconds", "Mean time per output token.", _ITL_S
        )
        self._e2e = histogram("e2e_request_latency_seconds", "End-to-end latency.", _REQUEST_S)
        self._queue = histogram("request_queue_time_seconds", "Time in WAITING.", _REQUEST_S)
        self._inference = histogram(
            "request_inference_time_seconds", "Time in RUNNING.", _REQUEST_S
        )
        self._prefill = histogram("request_prefill_time_seconds", "Time in PREFILL.", _REQUEST_S)
        self._decode = histogram("request_decode_time_seconds", "Time in DECODE.", _REQUEST_S)
        self._prompt = histogram("request_prompt_tokens", "Prefill tokens processed.", sizes)
        self._output = histogram("request_generation_tokens", "Generation tokens.", sizes)
        self._most_output = histogram(
            "request_max_num_generation_tokens", "Maximum of requested generation tokens.", sizes
        )
        self._asked = histogram("request_params_max_tokens", "The max_tokens parameter.", sizes)
        self._computed = histogram(
            "request_prefill_kv_computed_tokens", "KV tokens computed in prefill.", sizes
        )
        self._choices = histogram("request_params_n", "The n parameter.", _CHOICES)
        self._preempted = histogram(
            "request_num_preemptions", "Preemptions per request.", _PREEMPTIONS
        )
        self._step = histogram("iteration_tokens_total", "Tokens per engine step.", _STEP_TOKENS)
        self._pull_s = histogram("nixl_xfer_time_seconds", "Duration of KV transfers.", _TRANSFER_S)
        self._pull_bytes = histogram(
            "nixl_bytes_transferred", "Bytes of KV transfers.", _TRANSFER_BYTES
        )

        self._http = Counter(
            "http_requests_total", "Total number of requests.", ("handler", "method", "status")
        )
        self._http_s = Histogram(
            "http_request_duration_seconds", "Duration of requests.", _HTTP_S,
            ("handler", "method"),
        )  # fmt: skip
        self._process = [
            Counter("process_cpu_seconds_total", "Total user and system CPU time spent."),
            Gauge("process_resident_memory_bytes", "Resident memory size in bytes."),
            Gauge("process_open_fds", "Number of open file descriptors."),
            Gauge("process_start_time_seconds", "Start time of the process since the epoch."),
        ]
        self._process[3].set(time.time())

        self._old_gauges = [
            gauge("gpu_cache_usage_perc", "GPU KV-cache usage. 1 means 100 percent usage.")
        ] if old_names else []  # fmt: skip
        self._old_totals = {
            new: counter(f"gpu_{new}", "As its successor without gpu_.")
            for new in (("prefix_cache_queries", "prefix_cache_hits") if old_names else ())
        }
        self._old_tpot = [
            histogram("time_per_output_token_seconds", "Time per output token.", _ITL_S)
        ] if old_names else []  # fmt: skip

        self._registry = Registry(
            (
                self._running, self._waiting, self._waiting_by, self._usage, self._sleep,
                *((self._adapters,) if lora else ()), self._info, *self._totals.values(),
                self._by_source, self._success, self._rejected, self._ttft, self._itl, self._tpot,
                self._e2e, self._queue, self._inference, self._prefill, self._decode, self._prompt,
                self._output, self._most_output, self._asked, self._computed, self._choices,
                self._preempted, self._step, self._pull_s, self._pull_bytes, *self._old_gauges,
                *self._old_totals.values(), *self._old_tpot, self._http, self._http_s,
                *self._process,
            )
        )  # fmt: skip
        self._snapshot()

    # Told by the engine's driver

    def tokens(self, answer: Answer, count: int, gap_s: float | None) -> None:
        """Count a hand-out of tokens ``gap_s`` after the one before, None for the first."""
        of = self._of
        if gap_s is not None:
            self._itl.observe(gap_s, *of, count=count)
            for histogram in self._old_tpot:
                histogram.observe(gap_s, *of, count=count)
        else:
            request = answer.request
            if request.first_token_s is not None:
                self._ttft.observe(request.first_token_s - request.arrival_s, *of)
            self._count_prompt(request)
        if answer.finish_reason is not None:
            request = answer.request
            self.ended(request, answer.finish_reason, request.finish_s or 0.0)

    def stepped(self, tokens: int) -> None:
        """Take in the state after a step that had ``tokens`` output tokens."""
        if tokens:
            prompts = self._engine.prompt_tokens_total
            self._step.observe(tokens + prompts - self._prompt_tokens, *self._of)
            self._prompt_tokens = prompts
        self._snapshot()

    # Told by the server

    def accepted(self, *, n: int, max_tokens: int | None, lora: str | None) -> None:
        """Count the parameters of a request that was let in."""
        self._choices.observe(n, *self._of)
        if max_tokens is not None:
            self._asked.observe(max_tokens, *self._of)
        if lora is not None:
            self._loras_live[lora] = self._loras_live.get(lora, 0) + 1

    def left(self, lora: str | None) -> None:
        """Count an adapter's request out again."""
        if lora is not None:
            self._loras_live[lora] -= 1

    def rejected(self) -> None:
        """Count a request that found the queue full."""
        self._rejected.inc(*self._of, "max_num_queued_reqs")

    def pulled(self, request_id: str, tokens: int, size_bytes: float, took_s: float) -> None:
        """Count the KV of a prompt that came from elsewhere."""
        self._external[request_id] = tokens
        self._pull_s.observe(took_s, *self._of)
        self._pull_bytes.observe(size_bytes, *self._of)
        self._totals["external_prefix_cache_queries"].inc(*self._of, by=tokens)
        self._totals["external_prefix_cache_hits"].inc(*self._of, by=tokens)

    def pull_failed(self) -> None:
        """Count a failed transfer."""
        self._totals["nixl_num_failed_transfers"].inc(*self._of)

    def lease_expired(self) -> None:
        """Count blocks that nobody came for."""
        self._totals["nixl_num_kv_expired_reqs"].inc(*self._of)

    def answered(self, handler: str, method: str, status: int, took_s: float) -> None:
        """Count an HTTP answer."""
        self._http.inc(handler, method, f"{status // 100}xx")
        self._http_s.observe(took_s, handler, method)

    def ended(self, request: EngineRequest, reason: str, now_s: float) -> None:
        """Count a request that ended with ``stop``, ``length``, ``abort`` or ``error``."""
        of = self._of
        self._success.inc(*of, reason)
        self._external.pop(request.request_id, None)
        scheduled_s, first_s = request.first_scheduled_s, request.first_token_s
        end_s = now_s if request.finish_s is None else request.finish_s
        self._e2e.observe(max(0.0, end_s - request.arrival_s), *of)
        self._prompt.observe(request.prompt_tokens, *of)
        self._output.observe(request.generated_tokens, *of)
        self._most_output.observe(request.generated_tokens, *of)
        self._preempted.observe(request.preemptions, *of)
        if scheduled_s is None:
            return
        self._queue.observe(max(0.0, scheduled_s - request.arrival_s), *of)
        self._inference.observe(max(0.0, end_s - scheduled_s), *of)
        self._computed.observe(request.prompt_tokens - request.cached_tokens, *of)
        if first_s is None:
            return
        self._prefill.observe(first_s - scheduled_s, *of)
        self._decode.observe(max(0.0, end_s - first_s), *of)
        if request.generated_tokens > 1:
            mean_s = max(0.0, end_s - first_s) / (request.generated_tokens - 1)
            self._tpot.observe(mean_s, *of)

    # Told to whoever scrapes

    def render(self) -> str:
        """Return the exposition text as of the last step."""
        usage = resource.getrusage(resource.RUSAGE_SELF)
        cpu, memory, files, _start = self._process
        cpu.set(usage.ru_utime + usage.ru_stime)
        statm = Path("/proc/self/statm")
        if statm.exists():  # Linux
            pages = int(statm.read_text(encoding="ascii").split()[1])
            memory.set(pages * os.sysconf("SC_PAGE_SIZE"))
            files.set(sum(1 for _ in Path("/proc/self/fd").iterdir()))
        return self._registry.render()

    def _count_prompt(self, request: EngineRequest) -> None:
        of = self._of
        cached = request.cached_tokens
        external = min(self._external.pop(request.request_id, 0), cached)
        self._totals["prompt_tokens_cached"].inc(*of, by=cached)
        self._by_source.inc(*of, "external_kv_transfer", by=external)
        self._by_source.inc(*of, "local_cache_hit", by=cached - external)
        self._by_source.inc(*of, "local_compute", by=request.prompt_tokens - cached)

    def _snapshot(self) -> None:
        engine, of = self._engine, self._of
        self._running.set(engine.num_running, *of)
        waiting = max(0, engine.num_waiting - self.hidden)
        self._waiting.set(waiting, *of)
        self._waiting_by.set(max(0, waiting - self.deferred), *of, _WAITS[0])
        self._waiting_by.set(self.deferred, *of, _WAITS[1])
        usage = engine.kv_usage
        self._usage.set(usage, *of)
        for gauge in self._old_gauges:
            gauge.set(usage, *of)
        for level, name in enumerate(_SLEEP):
            self._sleep.set(float(level == self.sleep_level), *of, name)
        if self._lora:
            live = ",".join(sorted(name for name, count in self._loras_live.items() if count))
            self._adapters.clear()
            self._adapters.set(time.time(), str(len(self._lora)), "", live)
        for name, value in (
            ("prefix_cache_queries", engine.prefix_queries_total),
            ("prefix_cache_hits", engine.prefix_hits_total),
            ("prompt_tokens", engine.prompt_tokens_total),
            ("generation_tokens", engine.generation_tokens_total),
            ("num_preemptions", engine.preemptions_total),
        ):
            self._totals[name].set(value, *of)
            if name in self._old_totals:
                self._old_totals[name].set(value, *of)
