"""Structure and identity of LangGraph applications, as JSON and HTTP headers.

Runs inside a user's agent process, whose project may have modules called ``planner`` or
``models`` of its own: nothing here imports Almanac's other rooms. Importing this package loads
nothing else.
"""
