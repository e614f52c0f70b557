"""Modules of ours that vLLM loads as plugins.

vLLM loads plugins by entry point, in every process that it starts, however it starts it. A folder on PYTHONPATH with
a `.dist-info` has entry points like an installed package.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

ALLOWED = "VLLM_PLUGINS"  # vLLM's: the names of the plugins that it may load; all, if it is not set


def installed(name: str, module: Path, scratch: Path, env: Mapping[str, str]) -> dict[str, str]:
    """Put a copy of `module`, whose `install` vLLM calls, into `scratch`; returns what the environment `env` lacks."""
    shutil.copyfile(module, scratch / f"{name}.py")
    package = scratch / f"{name}-0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
    (package / "entry_points.txt").write_text(f"[vllm.general_plugins]\n{name} = {name}:install\n")
    allowed = env.get(ALLOWED, os.environ.get(ALLOWED))
    return {} if allowed is None else {ALLOWED: f"{allowed},{name}".strip(",")}
