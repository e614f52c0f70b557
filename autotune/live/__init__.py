"""Real vLLM, driven by MLPerf LoadGen on the wall clock."""
