"""Mock vLLM endpoints: real HTTP in front of the simulator's engine."""
