"""One trial: what is prepared, run, scored and kept, on any backend."""
