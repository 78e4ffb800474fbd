"""The live part of Almanac: gateway, endpoint clients, mock servers, LangGraph instrumentation.

Importing this package loads nothing else; sub-packages are imported on use.
"""
