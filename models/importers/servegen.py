"""Reader of ServeGen's client profiles: who sends how often, and how evenly, by window."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np

from models.tables import read_table
from planner.domain.arrivals import ArrivalWindow
from planner.domain.errors import InvalidInput

__all__ = ["WINDOW_S", "read_servegen"]

WINDOW_S = 600.0
_LAWS: dict[str, Literal["gamma", "weibull"]] = {"gamma": "gamma", "weibull": "weibull"}


def read_servegen(folder: Path, part: str = "m-small") -> list[ArrivalWindow]:
    """Return the windows of one service, by start and client.

    Parameters
    ----------
    folder
        The folder of the dataset ``servegen``, or the one that holds all datasets.
    part
        Service, as in ``arrivals_<part>.csv``.

    Raises
    ------
    InvalidInput
        If the table is missing or broken, naming line, column and value.

    Notes
    -----
    The published scale is not read: it fits the gaps of the busy part of a window, so that it does
    not always go with the published rate. The rate counts, and the fitted shape.
    """
    home = folder if folder.name == "servegen" else folder / "servegen"
    path = home / f"arrivals_{part}.csv"
    rows = read_table(
        path, numeric=["window_start_s", "rate_rps", "param1"], text=["client", "iat_dist"]
    )
    for column in ("rate_rps", "param1"):
        wrong = np.flatnonzero(~(rows[column] > 0).to_numpy())
        if wrong.size:
            raise InvalidInput(
                f"{rows[column].iloc[wrong[0]]!r} is not a number > 0",
                where=f"{path}:{wrong[0] + 2}: {column}",
                remedy="correct it or delete that line",
            )
    laws = rows["iat_dist"].str.lower()
    wrong = np.flatnonzero(~laws.isin(_LAWS).to_numpy())
    if wrong.size:
        raise InvalidInput(
            f"{rows['iat_dist'].iloc[wrong[0]]!r} is unknown",
            where=f"{path}:{wrong[0] + 2}: iat_dist",
            remedy="use Gamma or Weibull",
        )
    windows = [
        ArrivalWindow(
            client=client,
            start_s=float(start_s),
            end_s=float(start_s) + WINDOW_S,
            rate_rps=float(rate),
            law=_LAWS[law],
            shape=float(shape),
        )
        for client, start_s, rate, law, shape in zip(
            rows["client"], rows["window_start_s"], rows["rate_rps"], laws, rows["param1"],
            strict=True,
        )
    ]  # fmt: skip
    return sorted(windows, key=lambda window: (window.start_s, window.client))
