"""Every error Almanac raises on purpose.

PlannerError
  InvalidInput (also ValueError)   a file, field or argument the user can mend
    WorkflowError                  a workflow graph that breaks a rule
    FleetError                     a fleet description that breaks a rule
    TraceFormatError               a trace row or file that cannot be read
  SolveError
    ModelInvalid                   the solver refused the model
    Infeasible                     proven: no plan exists
    NoSolutionFound                the budget ran out before a first plan
  DispatchError
    NoEndpointAvailable            no healthy endpoint can take the call
    EndpointFailed                 an endpoint did not do what it promised
    IllegalEvent                   an event that its state does not allow
  DownloadFailed                   a public dataset could not be fetched whole and unchanged
"""

from __future__ import annotations

__all__ = [
    "DispatchError",
    "DownloadFailed",
    "EndpointFailed",
    "FleetError",
    "IllegalEvent",
    "Infeasible",
    "InvalidInput",
    "ModelInvalid",
    "NoEndpointAvailable",
    "NoSolutionFound",
    "PlannerError",
    "SolveError",
    "TraceFormatError",
    "WorkflowError",
]


class PlannerError(Exception):
    """Base of all errors raised on purpose."""


class InvalidInput(PlannerError, ValueError):
    """Input a user can mend; names the place, the value found and the remedy.

    Parameters
    ----------
    what
        What is wrong, with the offending value.
    where
        File, and field inside it, for example ``fleet.yaml: workers[2].gpu``.
    remedy
        What to do about it.
    """

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        self.what, self.where, self.remedy = what, where, remedy
        text = f"{where}: {what}" if where else what
        super().__init__(f"{text}; {remedy}" if remedy else text)


class WorkflowError(InvalidInput):
    """A workflow graph that breaks a rule."""


class FleetError(InvalidInput):
    """A fleet description that breaks a rule."""


class TraceFormatError(InvalidInput):
    """A trace row or file that cannot be read."""


class SolveError(PlannerError):
    """The solver gave no plan; the subclass says why."""


class ModelInvalid(SolveError):
    """The solver refused the model; the message holds its reason."""


class Infeasible(SolveError):
    """It is proven that no plan exists; the message names the smallest known reason."""


class NoSolutionFound(SolveError):
    """The budget ran out before a first plan was found."""


class DispatchError(PlannerError):
    """A call could not be dispatched."""


class NoEndpointAvailable(DispatchError):
    """No healthy endpoint can take the call."""


class EndpointFailed(DispatchError):
    """An endpoint failed a call."""


class IllegalEvent(DispatchError):
    """An event that the current state does not allow; nothing was changed."""


class DownloadFailed(PlannerError):
    """A public dataset could not be fetched whole and unchanged; the message says what to do."""
