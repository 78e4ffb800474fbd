"""Texts of ``/metrics`` as scrapes."""

import pytest

from planner.dispatch.scrape import parse_metrics, read_scrape
from planner.domain.errors import InvalidInput

TEXT = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:kv_cache_usage_perc{engine="0",model_name="m"} 0.25
vllm:cache_config_info{block_size="16",num_gpu_blocks="1000",cache_dtype="a\\"},b"} 1.0
vllm:iteration_tokens_total_bucket{engine="0",le="+Inf",model_name="m"} 40
vllm:iteration_tokens_total_count{engine="0",model_name="m"} 40
vllm:generation_tokens_total{engine="0",model_name="m"} 1.2e+02
vllm:prompt_tokens_total{engine="0",model_name="m"} 900
vllm:prefix_cache_hits_total{engine="0",model_name="m"} 100
vllm:request_prompt_tokens_count{engine="0",model_name="m"} 7
vllm:inter_token_latency_seconds_sum{engine="0",model_name="m"} 1.5
vllm:inter_token_latency_seconds_count{engine="0",model_name="m"} 110
process_open_fds 17 1712345678
"""


def test_a_scrape_is_read():
    """Counters, gauges and the pool's size come out of the text."""
    scrape = read_scrape(TEXT, 5.0)
    assert (scrape.time_s, scrape.steps, scrape.generation_tokens) == (5.0, 40, 120)
    assert (scrape.prompt_tokens, scrape.cached_tokens, scrape.prompts) == (900, 100, 7)
    assert (scrape.running, scrape.kv_tokens) == (3, 4000)
    assert (scrape.gap_s, scrape.gaps) == (1.5, 110)
    assert read_scrape(TEXT, 5.0, pool_tokens=100.0).kv_tokens == 25.0


def test_labels_may_hold_anything():
    """Escaped quotes, braces and commas in label values are read as they are."""
    labels = {name: labels for name, labels, _ in parse_metrics(TEXT)}
    assert labels["vllm:cache_config_info"]["cache_dtype"] == 'a"},b'


def test_older_names_and_several_engines():
    """Names of older servers count where the new ones are absent; engines are added up."""
    old = TEXT.replace("kv_cache_usage_perc", "gpu_cache_usage_perc").replace(
        "inter_token_latency", "time_per_output_token"
    )
    assert read_scrape(old, 0.0) == read_scrape(TEXT, 0.0)
    second = TEXT.replace('engine="0"', 'engine="1"')
    both = read_scrape(TEXT + second, 0.0)
    assert (both.steps, both.running, both.kv_tokens) == (80, 6, 8000)


@pytest.mark.parametrize("name", ["num_requests_running", "kv_cache_usage_perc", "cache_config"])
def test_what_is_missing_is_named(name):
    """A scrape that cannot teach anything says which metric it lacks."""
    text = "\n".join(line for line in TEXT.splitlines() if f"vllm:{name}" not in line)
    with pytest.raises(InvalidInput, match=f"vllm:{name}"):
        read_scrape(text, 0.0)


@pytest.mark.parametrize("line", ["<html>", "vllm:steps", "vllm:steps{a} many"])
def test_other_texts_are_refused(line):
    """A page that is no metrics text is refused with its line."""
    with pytest.raises(InvalidInput, match="line 2"):
        list(parse_metrics("# fine\n" + line))
