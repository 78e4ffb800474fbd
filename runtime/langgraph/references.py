"""What a function refers to: the values behind its globals, closure and attribute paths.

Read from the code object, never by running anything. The answer errs on the side of too much: a
value can be listed although the function does not reach it at run time. Helpers the user wrote
are followed; library functions are not, because half of every library is reachable from them.
"""

from __future__ import annotations

import dis
import functools
import inspect
import sys
from collections.abc import Iterator
from itertools import islice
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from langchain_core.language_models import BaseLanguageModel
from langchain_core.runnables import Runnable
from langgraph.types import Command, Send

__all__ = ["calls_model", "code_constants", "functions_of", "jumps", "sends"]

# Guards against object graphs that never end; far above what a node function refers to.
_MAX_VALUES = 2_000
_MAX_ITEMS = 50
_LIBRARIES = ("langchain", "langgraph", "openai", "pydantic", "httpx")


def functions_of(runnable: Any) -> Iterator[Any]:
    """Yield the plain callables behind a node or router, LangChain's wrappers taken off."""
    if isinstance(runnable, Runnable):
        for name in ("func", "afunc"):
            if callable(function := getattr(runnable, name, None)):
                yield from _unwrapped(function)
    else:
        yield from _unwrapped(runnable)


def calls_model(runnable: Any) -> bool:
    """Return whether a node refers to a chat model or an OpenAI client."""
    return any(_is_model(value) for value in _references(runnable))


def sends(runnable: Any) -> bool:
    """Return whether a router or node refers to `langgraph.types.Send`."""
    return any(value is Send for value in _references(runnable))


def jumps(runnable: Any) -> bool:
    """Return whether a node builds a `langgraph.types.Command` with ``goto``."""
    return "goto" in code_constants(runnable) and any(
        value is Command for value in _references(runnable)
    )


def code_constants(runnable: Any) -> frozenset[str]:
    """Return the text constants in the code of a node or router, inner functions included."""
    found: set[str] = set()
    for function in functions_of(runnable):
        for code in _codes(_code_of(function)):
            for constant in code.co_consts:
                # Names of keyword arguments are stored as one tuple per call.
                parts = constant if isinstance(constant, (tuple, frozenset)) else (constant,)
                found.update(part for part in parts if isinstance(part, str))
    return frozenset(found)


def _is_model(value: Any) -> bool:
    if isinstance(value, type):
        return issubclass(value, BaseLanguageModel) and not inspect.isabstract(value)
    if isinstance(value, (FunctionType, MethodType, ModuleType)):
        return False
    return isinstance(value, BaseLanguageModel) or (
        type(value).__module__.partition(".")[0] == "openai"
    )


def _references(root: Any) -> Iterator[Any]:
    own = set(map(id, functions_of(root)))
    pending: list[Any] = [root]
    seen: dict[int, Any] = {}  # keeps the values alive, so that an id is never used again
    while pending and len(seen) < _MAX_VALUES:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        yield value
        if isinstance(value, BaseLanguageModel):
            continue  # this is what the search is for
        if isinstance(value, Runnable):
            # Sequences, bindings, lambdas and LangGraph's own callables hold their parts here.
            names = ("func", "afunc", "bound", "steps", "steps__")
            pending.extend(getattr(value, name, None) for name in names)
        elif isinstance(value, dict):
            pending.extend(islice(value.values(), _MAX_ITEMS))
        elif isinstance(value, (list, tuple)):
            pending.extend(islice(value, _MAX_ITEMS))
        elif callable(value) and not isinstance(value, type):
            for function in _unwrapped(value):
                pending.extend(_named_in(function, follow=id(function) in own))


def _unwrapped(function: Any) -> Iterator[Any]:
    """Yield a callable and what it wraps: partial, decorated function."""
    while function is not None:
        yield function
        if isinstance(function, functools.partial):
            yield from (a for a in (*function.args, *function.keywords.values()) if callable(a))
            function = function.func
        else:
            function = getattr(function, "__wrapped__", None)


def _named_in(function: Any, *, follow: bool) -> list[Any]:
    """Return the values a function names; of a library function its closure only."""
    code = _code_of(function)
    if code is None:
        return []
    plain = _plain(function)
    found = list(_cells(plain))
    if not follow and _is_library(plain):
        return found
    attributes: set[str] = set()
    for one in _codes(code):
        for instruction in dis.get_instructions(one):
            if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
                if instruction.argval in plain.__globals__:
                    found.append(plain.__globals__[instruction.argval])
            elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
                attributes.add(instruction.argval)
    if isinstance(function, MethodType):
        found.append(function.__self__)
    elif not isinstance(function, FunctionType):
        found.append(function)  # an object with __call__
    # ``self.chat``, ``settings.models.fast``, ``agent.answer(...)``: along the named attributes.
    # The list grows while it is read.
    names = sorted(attributes)
    seen: set[int] = set()
    for value in found:
        if id(value) not in seen and len(found) < _MAX_VALUES:
            seen.add(id(value))
            for name in names:
                found.extend(_attribute(value, name))
    return found


def _attribute(value: Any, name: str) -> Iterator[Any]:
    if isinstance(value, (type, FunctionType, MethodType, BaseLanguageModel)):
        return
    own = getattr(value, "__dict__", {})
    if name in own:
        yield own[name]
    elif not isinstance(value, ModuleType):
        member = inspect.getattr_static(type(value), name, None)
        if isinstance(member, FunctionType):
            yield MethodType(member, value)


def _plain(function: Any) -> Any:
    inner = function.__func__ if isinstance(function, MethodType) else function
    return inner if isinstance(inner, FunctionType) else type(inner).__call__


def _code_of(function: Any) -> CodeType | None:
    if isinstance(function, (type, functools.partial)) or not callable(function):
        return None
    code = getattr(_plain(function), "__code__", None)
    return code if isinstance(code, CodeType) else None


def _cells(function: Any) -> Iterator[Any]:
    for cell in getattr(function, "__closure__", None) or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a recursive function that is not bound yet
            continue


def _codes(code: CodeType | None) -> Iterator[CodeType]:
    if code is None:
        return
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _is_library(function: Any) -> bool:
    root = str(getattr(function, "__module__", "")).partition(".")[0]
    return root in sys.stdlib_module_names or root.startswith(_LIBRARIES)
