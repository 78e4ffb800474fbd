"""Finding what a folder holds: our own traces, and public datasets by the name of their folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from models.importers import agents, services
from models.importers.own import OwnTraces, read_own_traces
from models.tables import Dataset
from planner.domain.errors import InvalidInput

__all__ = ["DATASETS", "Sources", "read_folder"]

DATASETS: dict[str, Callable[[Path, int], list[Dataset]]] = {
    "azure_llm_2023": lambda folder, _: [
        services.read_azure(folder, "code"),
        services.read_azure(folder, "conv"),
    ],
    "claude_code_sessions": lambda folder, seed: [agents.read_claude_code(folder, seed)],
    "llm_pilot_tgi": lambda folder, seed: [services.read_llm_pilot(folder, seed)],
    "lmcache_agents": lambda folder, seed: [agents.read_lmcache(folder, seed)],
    "miniswe_swebench_verified": lambda folder, seed: [agents.read_miniswe(folder, seed)],
    "mooncake_fast25": lambda folder, _: [services.read_mooncake(folder)],
    "tau_bench_airline": lambda folder, seed: [agents.read_tau_bench(folder, seed)],
    "vllm_bench_llmservingsim": lambda folder, _: [services.read_vllm_bench(folder)],
    "who_and_when": lambda folder, seed: [agents.read_who_and_when(folder, seed)],
}
"""Public datasets by folder name, with the function (folder, seed) that reads them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What was found: own traces (or None), public datasets, and names that were passed over."""

    own: OwnTraces | None
    public: tuple[Dataset, ...]
    ignored: tuple[str, ...]


def read_folder(path: Path, seed: int, progress: Callable[[str], None] = lambda _: None) -> Sources:
    """Read a trace file, a dataset folder, or a folder that holds some of either.

    Raises
    ------
    InvalidInput
        If the path does not exist, holds nothing to learn from, or one of its files is broken.
    """
    if not path.exists():
        raise InvalidInput(
            "no such file or folder", where=str(path), remedy="check the path after --traces"
        )
    if path.is_file():
        progress(f"reading {path.name}")
        return Sources(own=read_own_traces([path]), public=(), ignored=())
    if path.name in DATASETS:
        folders, traces, ignored = [path], [], []
    else:
        entries = sorted(path.iterdir())
        folders = [entry for entry in entries if entry.is_dir() and entry.name in DATASETS]
        traces = [entry for entry in entries if entry.is_file() and entry.suffix == ".jsonl"]
        ignored = [entry.name for entry in entries if entry not in (*folders, *traces)]
    if not folders and not traces:
        raise InvalidInput(
            "holds no trace (*.jsonl) and no known dataset folder",
            where=str(path),
            remedy=f"give traces of schema almanac.trace/1 or any of {', '.join(sorted(DATASETS))}",
        )
    own = None
    if traces:
        progress(f"reading {len(traces)} of our traces")
        own = read_own_traces(traces)
    public: list[Dataset] = []
    for folder in folders:
        progress(f"reading {folder.name}")
        public += DATASETS[folder.name](folder, seed)
    return Sources(own=own, public=tuple(public), ignored=tuple(ignored))
