"""vLLM's own engine configuration, built without an engine: takes milliseconds and no GPU."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autotune.backend import DryRunOutcome
from autotune.live.flags import PROBE, Vllm, probe


def dry_run(
    vllm: Vllm, env: tuple[tuple[str, str], ...], model: Path, args: Mapping[str, Any], cache_dir: Path
) -> DryRunOutcome:
    """What `vllm` makes of the flags `args` for the model in folder `model`; answers are cached on disk."""
    words = ["--model", str(model), *vllm.command_line(args)]
    parts = [vllm.python, vllm.version, PROBE.read_text(), (model / "config.json").read_text(), *map(str, env), *words]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    cached = cache_dir / "vllm" / "dry-run" / f"{key}.json"
    if cached.exists():
        return DryRunOutcome(**json.loads(cached.read_text()))
    answer = probe(vllm.python, env).ask(words)
    cached.parent.mkdir(parents=True, exist_ok=True)
    draft = cached.with_suffix(f".{os.getpid()}")
    draft.write_text(json.dumps(answer))
    draft.rename(cached)
    return DryRunOutcome(**answer)
