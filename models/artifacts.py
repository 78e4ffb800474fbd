"""Saved predictors: a header that can be read without loading anything, then a joblib payload.

joblib files are pickles and run code when loaded, so the header is checked first: a file that is
not ours, damaged, or made by other versions is refused with a clear error before unpickling. The
header proves integrity, not origin: load only artifacts you trained.
"""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import sklearn

from models.features import CHOICE, DELAY, LENGTH
from planner.domain.errors import InvalidInput
from planner.domain.files import atomic_write

__all__ = [
    "ARTIFACT_SCHEMA",
    "ArtifactInfo",
    "load_artifact",
    "read_info",
    "save_artifact",
    "unusable",
]

ARTIFACT_SCHEMA = "almanac.artifact/1"
_MAGIC = b"ALMANAC ARTIFACT\n"
_REMEDY = "make it again with `almanac train`"

FEATURES: dict[str, str] = {
    "output_length": LENGTH.version,
    "tool_delay": DELAY.version,
    "branching": CHOICE.version,
    "endpoint_latency": "latency/2",
    "arrivals": "arrivals/1",
}
"""Feature schema by kind of predictor."""


def _libraries() -> dict[str, str]:
    # Estimators are pickled; scikit-learn promises nothing across minor versions.
    return {
        name: ".".join(module.__version__.split(".")[:2])
        for name, module in (("joblib", joblib), ("numpy", np), ("scikit-learn", sklearn))
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactInfo:
    """What an artifact says of itself.

    Parameters
    ----------
    kind
        One of the keys of `FEATURES`.
    dataset
        What it was trained on.
    window, data_hash
        Span and content hash of the training data.
    metrics
        Measured on held-out rows, before the final fit on all rows.
    """

    kind: str
    dataset: str
    window: str
    data_hash: str
    metrics: dict[str, float]
    features: str = ""
    libraries: dict[str, str] = field(default_factory=_libraries)


def save_artifact(predictor: Any, info: ArtifactInfo, path: Path) -> None:
    """Write a predictor with its header, atomically."""
    payload = io.BytesIO()
    joblib.dump(predictor, payload, compress=3)
    header = {
        "schema": ARTIFACT_SCHEMA,
        **asdict(info),
        "features": FEATURES[info.kind],
        "sha256": hashlib.sha256(payload.getvalue()).hexdigest(),
    }
    with atomic_write(path) as temporary, temporary.open("wb") as out:
        out.write(_MAGIC)
        out.write(json.dumps(header, sort_keys=True).encode() + b"\n")
        out.write(payload.getvalue())


def _open(path: Path) -> tuple[dict[str, Any], bytes]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidInput(
            f"cannot read the artifact: {error.strerror}", where=str(path), remedy="check the path"
        ) from error
    if not content.startswith(_MAGIC):
        raise InvalidInput("is not an Almanac artifact", where=str(path), remedy=_REMEDY)
    line, _, payload = content[len(_MAGIC) :].partition(b"\n")
    try:
        header = json.loads(line)
        schema, digest = header["schema"], header["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInput("its header is damaged", where=str(path), remedy=_REMEDY) from error
    if schema != ARTIFACT_SCHEMA:
        raise InvalidInput(
            f"schema is {schema!r}, this version reads {ARTIFACT_SCHEMA}",
            where=str(path),
            remedy=_REMEDY,
        )
    if hashlib.sha256(payload).hexdigest() != digest:
        raise InvalidInput("its content is damaged", where=str(path), remedy=_REMEDY)
    return header, payload


def read_info(path: Path) -> ArtifactInfo:
    """Return the header of an artifact without loading the predictor.

    Raises
    ------
    InvalidInput
        If the file cannot be read, is not ours or is damaged.
    """
    header, _ = _open(path)
    try:
        return ArtifactInfo(**{name: header[name] for name in ArtifactInfo.__dataclass_fields__})
    except KeyError as error:
        raise InvalidInput(
            f"its header lacks {error.args[0]!r}", where=str(path), remedy=_REMEDY
        ) from error


def unusable(info: ArtifactInfo) -> str | None:
    """Return why this installation cannot load an artifact, or None if it can."""
    schema = FEATURES.get(info.kind)
    if info.features != schema:
        return f"was made with feature schema {info.features!r}, this version has {schema!r}"
    for name, version in _libraries().items():
        if info.libraries.get(name) != version:
            return f"was made with {name} {info.libraries.get(name)}, here is {version}"
    return None


def load_artifact(path: Path, kind: str) -> tuple[Any, ArtifactInfo]:
    """Return a predictor and what its artifact says of itself.

    Raises
    ------
    InvalidInput
        If the file is not an artifact of this kind, is damaged, or was made with another feature
        schema or other minor versions of the libraries.
    """
    info = read_info(path)
    if info.kind != kind:
        raise InvalidInput(
            f"holds a predictor of {info.kind!r}",
            where=str(path),
            remedy=f"give the artifact of {kind!r}",
        )
    problem = unusable(info)
    if problem is not None:
        raise InvalidInput(problem, where=str(path), remedy=_REMEDY)
    _, payload = _open(path)
    return joblib.load(io.BytesIO(payload)), info
