"""The sans-I/O router, its policies and the dispatch table; the same code live and simulated."""
