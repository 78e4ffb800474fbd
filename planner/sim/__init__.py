"""Simulation: the vLLM engine, its step times, and what drives them."""
