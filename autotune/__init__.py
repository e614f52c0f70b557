"""Finds the best vLLM server configuration for a model and a workload."""

from pathlib import Path

__version__ = "0.2.0"

# Lets `python -m autotune.verify` run autotune/commands/verify.py, as `autotune verify` does.
__path__.append(str(Path(__file__).parent / "commands"))
