"""Step times: the row, the tables, and their input."""

from pathlib import Path

import numpy as np
import pytest

from planner.domain.errors import InvalidInput
from planner.domain.latency import LatencyRow
from planner.sim.steptime import Batch, RowStepTime, TableStepTime, standard_normals

ROW = LatencyRow(
    prefill_base_ms=8.0,
    prefill_us_per_token=50.0,
    prefill_ns_per_token_sq=2.0,
    decode_base_ms=5.0,
    decode_us_per_call=30.0,
    decode_ns_per_kv_token=80.0,
    scale=1.5,
)


def batch(decodes: int = 0, context: int = 0, chunks: tuple[tuple[int, int], ...] = ()) -> Batch:
    return Batch(
        decodes=decodes, context_tokens=context, chunks=chunks, yields=decodes, used_blocks=0
    )


def test_a_prompt_alone_costs_what_the_row_says() -> None:
    """On an idle engine a prompt of n tokens takes a + b n + c n^2."""
    assert RowStepTime(ROW).seconds(batch(chunks=((700, 0),))) == pytest.approx(ROW.prefill_s(700))


def test_a_decode_step_costs_what_the_row_says_both_ways() -> None:
    """A decode-only step is d + e B + f KV, also as the line used for many steps."""
    expected = ROW.decode_step_s(12, 9000)
    assert RowStepTime(ROW).seconds(batch(12, 9000)) == pytest.approx(expected)
    base_s, slope_s = RowStepTime(ROW).decode_line(12)
    assert base_s + slope_s * 9000 == pytest.approx(expected)


def test_chunks_add_to_the_decodes_beside_them() -> None:
    """In a mixed step each chunk adds its tokens, and its attention at its depth."""
    mixed = RowStepTime(ROW).seconds(batch(3, 900, ((100, 0), (200, 300))))
    expected = ROW.decode_step_s(3, 900) + ROW.prefill_marginal_s(100)
    assert mixed == pytest.approx(expected + ROW.prefill_marginal_s(200, 300))


def test_overhead_is_added_to_every_step() -> None:
    """Host work comes on top, unscaled."""
    time = RowStepTime(ROW, overhead_s=0.25)
    assert time.seconds(batch(12, 9000)) == pytest.approx(0.25 + ROW.decode_step_s(12, 9000))
    assert time.seconds(batch(chunks=((7, 0),))) == pytest.approx(0.25 + ROW.prefill_s(7))


@pytest.fixture
def profiles(tmp_path: Path) -> Path:
    """Profiles of one GPU: dense 2 us a token and layer, attention with a hole in its grid."""
    head = "gpu,model,dtype,tp,layer"
    (tmp_path / "op_dense.csv").write_text(
        f"{head},tokens,time_us\n"
        "G,m,bf16,1,embedding,1,2\nG,m,bf16,1,embedding,100,200\n"
        "G,m,bf16,1,layernorm,1,2\nG,m,bf16,1,layernorm,100,200\n"
        "G,m,bf16,1,qkv_proj,1,2\nG,m,bf16,1,qkv_proj,100,200\n"
        "G,m,bf16,2,qkv_proj,1,999\nH,m,bf16,1,qkv_proj,1,999\n"
    )
    (tmp_path / "op_per_sequence.csv").write_text(
        f"{head},sequences,time_us\nG,m,bf16,1,lm_head,1,1000\nG,m,bf16,1,lm_head,11,2000\n"
    )
    (tmp_path / "op_attention_full_G.csv").write_text(
        "prefill_chunk,kv_prefill,n_decode,kv_decode,time_us\n"
        "0,0,1,100,10\n0,0,1,200,20\n0,0,3,100,30\n0,0,3,200,60\n"
        "100,0,0,0,500\n100,400,0,0,900\n100,0,1,100,600\n"
    )
    return tmp_path


def seconds(folder: Path, one: Batch) -> float:
    return TableStepTime.from_profiles(folder, "G", max_tokens=200, max_calls=20).seconds(one)


def test_tables_compose_a_decode_step(profiles: Path) -> None:
    """Layers by their count at the batch size, head by calls, attention between its points."""
    dense = 2 * 2 * (1 + 64 + 32)  # 2 us x 2 tokens, embedding once, norms 64, projection 32
    head = 1000 + 100
    attention = 32 * (15 + 45) / 2  # between 1 and 3 calls, at context 150
    expected = (dense + head + attention) * 1e-6
    assert seconds(profiles, batch(2, 300)) == pytest.approx(expected)


def test_tables_merge_chunks_and_stay_inside_what_was_measured(profiles: Path) -> None:
    """Chunks are merged at the depth that keeps the attended pairs; holes are left out."""
    # 50 tokens at depth 200 and 50 at 250 attend the pairs of 100 at depth 200; between chunk
    # sizes 0 and 100 nothing without decodes was measured below 100.
    merged = seconds(profiles, batch(chunks=((50, 200), (50, 250))))
    assert merged == pytest.approx((200 * 97 + 32 * 700) * 1e-6)
    assert seconds(profiles, batch(chunks=((30, 0),))) == pytest.approx((60 * 97 + 32 * 500) * 1e-6)


def test_tables_go_on_with_the_last_slope(profiles: Path) -> None:
    """A batch beyond the largest measured one extends the last segment."""
    expected = (400 * 97 + 32 * 500) * 1e-6
    assert seconds(profiles, batch(chunks=((200, 0),))) == pytest.approx(expected)


def test_bad_tables_are_named(profiles: Path) -> None:
    """A missing file, an unknown GPU, a wrong column: one error that says where."""
    with pytest.raises(InvalidInput, match=r"op_dense.csv.*'X'"):
        TableStepTime.from_profiles(profiles, "X")
    (profiles / "op_attention_full_G.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InvalidInput, match="op_attention_full_G"):
        TableStepTime.from_profiles(profiles, "G")
    (profiles / "op_per_sequence.csv").unlink()
    with pytest.raises(InvalidInput, match="op_per_sequence"):
        TableStepTime.from_profiles(profiles, "G")
    (profiles / "op_dense.csv").write_text("gpu,tp,layer,tokens,time_us\nG,1,x,one,2\n")
    with pytest.raises(InvalidInput, match="op_dense"):
        TableStepTime.from_profiles(profiles, "G")


def test_normals_are_those_of_single_draws() -> None:
    """Drawing many at once changes nothing, across the end of what is drawn together too."""
    normals = standard_normals(np.random.default_rng(3))
    rng = np.random.default_rng(3)
    assert [next(normals) for _ in range(600)] == [rng.standard_normal() for _ in range(600)]
