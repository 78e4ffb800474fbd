"""Distinct id types, so that a run id is never passed where a call id is meant."""

from __future__ import annotations

from typing import NewType

__all__ = ["CallId", "EndpointId", "NodeId", "RunId", "SiteId", "WorkflowHash"]

WorkflowHash = NewType("WorkflowHash", str)
NodeId = NewType("NodeId", str)
SiteId = NewType("SiteId", str)
RunId = NewType("RunId", str)
CallId = NewType("CallId", str)
EndpointId = NewType("EndpointId", str)
