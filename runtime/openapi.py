"""The gateway's own description of its routes, in OpenAPI 3.1, for clients, people and fuzzers.

Inference bodies are described as far as the gateway reads them; further fields are passed on to
the engines as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["openapi"]

_ERROR = {"$ref": "#/components/schemas/Error"}
_OBJECT: Mapping[str, Any] = {"type": "object"}
_TEXT: Mapping[str, Any] = {"type": "string"}
_NAME: Mapping[str, Any] = {"type": "string", "minLength": 1}


def openapi(version: str) -> dict[str, Any]:
    """Return the document.

    Parameters
    ----------
    version
        Of the gateway.
    """
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Almanac gateway",
            "version": version,
            "description": "Schedules the calls of agent workflows over a fleet of vLLM servers.",
        },
        "paths": {**_inference(), **_facts(), **_runs(), **_admin()},
        "components": {
            "schemas": {"Error": _error_schema()},
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "Of a tenant, if any."},
                "admin": {"type": "http", "scheme": "bearer", "description": "Of the operator."},
            },
        },
    }


def _error_schema() -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {
                    "message": _TEXT,
                    "type": _TEXT,
                    "param": {"type": ["string", "null"]},
                    "code": {"type": "integer"},
                },
            }
        },
    }


def _answers(*errors: int, ok: int = 200, content: Mapping[str, Any] | None = None) -> Any:
    answers: dict[str, Any] = {
        str(ok): {
            "description": "Done.",
            "content": content or {"application/json": {"schema": _OBJECT}},
        }
    }
    for status in errors:
        answers[str(status)] = {
            "description": "Refused.",
            "content": {"application/json": {"schema": _ERROR}},
        }
    return answers


def _body(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _inference() -> dict[str, Any]:
    message = {
        "type": "object",
        "required": ["role"],
        "properties": {"role": _TEXT, "content": {}},
    }
    common: dict[str, Any] = {
        "model": _TEXT,
        "stream": {"type": "boolean"},
        "max_tokens": {"type": "integer", "minimum": 1},
    }
    bodies: dict[str, tuple[str, dict[str, Any]]] = {
        "/v1/chat/completions": (
            "Answer a conversation.",
            {"messages": {"type": "array", "items": message, "minItems": 1}},
        ),
        "/v1/completions": (
            "Continue a text.",
            {"prompt": {"oneOf": [_TEXT, {"type": "array", "items": {"type": "integer"}}]}},
        ),
        "/v1/embeddings": (
            "Embed texts.",
            {"input": {"oneOf": [_TEXT, {"type": "array", "items": _TEXT}]}},
        ),
        "/v1/responses": (
            "Answer, in the responses format.",
            {"input": {"oneOf": [_TEXT, {"type": "array", "items": _OBJECT}]}},
        ),
    }
    content = {
        "application/json": {"schema": _OBJECT},
        "text/event-stream": {"schema": _TEXT},
    }
    return {
        path: {
            "post": {
                "summary": summary,
                "security": [{"key": []}, {}],
                "requestBody": _body(
                    {"type": "object", "required": list(own), "properties": {**common, **own}}
                ),
                # The engine's own answers of 4xx and 5xx come through as they are.
                "responses": _answers(
                    400, 401, 404, 413, 422, 429, 431, 500, 501, 502, 503, content=content
                ),
            }
        }
        for path, (summary, own) in bodies.items()
    }


def _get(summary: str, *errors: int, text: bool = False, **more: Any) -> dict[str, Any]:
    content = {"text/plain": {"schema": _TEXT}} if text else None
    return {"get": {"summary": summary, "responses": _answers(*errors, content=content), **more}}


def _facts() -> dict[str, Any]:
    nothing = {"get": {"summary": "Alive.", "responses": {"200": {"description": "Yes."}}}}
    ready = {
        "get": {
            "summary": "Whether an endpoint is up.",
            "responses": {
                "200": {"description": "Yes."},
                "503": _answers(503)["503"],
            },
        }
    }
    return {
        "/v1/models": _get("Models of the fleet."),
        "/v1/models/{id}": _get("One model.", 404, parameters=[_in_path("id")]),
        "/health": nothing,
        "/healthz": nothing,
        "/liveness": nothing,
        "/readiness": ready,
        "/version": _get("Version of the gateway."),
        "/metrics": _get("Prometheus text.", text=True),
        "/openapi.json": _get("This document."),
    }


def _runs() -> dict[str, Any]:
    event = {
        "type": "object",
        "required": ["type", "run_id"],
        "properties": {
            "type": {"enum": ["run_start", "run_end", "tool_start", "tool_end", "branch"]},
            "run_id": _NAME,
        },
    }
    own: dict[str, Any] = {"security": [{"key": []}, {}]}
    return {
        "/almanac/v1/workflows": {
            "post": {
                "summary": "Register a workflow graph.",
                **own,
                "requestBody": _body(_OBJECT),
                "responses": _answers(400, 401, 413),
            }
        },
        "/almanac/v1/events": {
            "post": {
                "summary": "What happened in runs.",
                **own,
                "requestBody": _body(
                    {
                        "type": "object",
                        "required": ["events"],
                        "properties": {"events": {"type": "array", "items": event}},
                    }
                ),
                "responses": _answers(400, 401, 413),
            }
        },
        "/finish_session": {
            "post": {
                "summary": "A session is over.",
                **own,
                "requestBody": _body(
                    {
                        "type": "object",
                        "required": ["session_id"],
                        "properties": {"session_id": _NAME},
                    }
                ),
                "responses": _answers(400, 401, 413),
            }
        },
    }


def _in_path(name: str) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": _NAME}


def _admin() -> dict[str, Any]:
    errors = (400, 401, 403, 404, 409, 413)

    def operation(summary: str, body: Mapping[str, Any] | None = None, **more: Any) -> Any:
        found = {
            "summary": summary,
            "security": [{"admin": []}],
            "responses": _answers(*errors, **more),
        }
        return found if body is None else {**found, "requestBody": _body(body)}

    worker = [_in_path("id")]
    path = {"type": "object", "required": ["path"], "properties": {"path": {}}}
    policy = {"type": "object", "required": ["policy"], "properties": {"policy": _NAME}}
    return {
        "/workers": {
            "get": operation("All endpoints."),
            "post": operation("Add one, written as in a fleet file.", _OBJECT, ok=201),
        },
        "/workers/{id}": {"parameters": worker, "delete": operation("Remove one.")},
        "/workers/{id}/drain": {
            "parameters": worker,
            "post": operation("Send it no new calls."),
            "delete": operation("Send it calls again."),
        },
        "/scheduling/diagnostics": {"get": operation("What the router knows.")},
        "/almanac/v1/diagnostics": {"get": operation("What the router knows.")},
        "/almanac/v1/live": {"get": operation("Endpoints, runs and decisions as they are now.")},
        "/almanac/v1/runs/{id}": {
            "parameters": worker,
            "get": operation("One run, call by call."),
        },
        "/almanac/v1/policy": {"post": operation("Switch the policy.", policy)},
        "/almanac/v1/table": {"post": operation("Load a dispatch table.", _OBJECT)},
        "/almanac/v1/trace": {"post": operation("Open another trace, or none.", path)},
    }
