"""One trial, on any backend: prepared, run, scored and recorded."""
