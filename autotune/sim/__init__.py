"""A simulated vLLM server: its scheduler's decisions on a virtual clock, a step's time from a cost model."""
