"""Readers of traces and public datasets.

`agent_sessions` and `arrivals` give plain records for replay; `read_folder` gives the tables the
predictors learn from.
"""

from models.importers.folder import DATASETS, Sources, read_folder
from models.importers.replay import AgentCall, AgentSession, Arrivals, agent_sessions, arrivals
from models.importers.servegen import read_servegen

__all__ = [
    "DATASETS",
    "AgentCall",
    "AgentSession",
    "Arrivals",
    "Sources",
    "agent_sessions",
    "arrivals",
    "read_folder",
    "read_servegen",
]
