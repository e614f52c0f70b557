"""vLLM's own engine configuration, built without an engine: takes milliseconds and no GPU."""

import hashlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from autotune.backend import DryRunOutcome
from autotune.errors import InputError
from autotune.live.flags import ENV, PROBE, Vllm


class DryRun:
    """Asks one vLLM interpreter, kept open since its imports take seconds; answers are cached on disk."""

    def __init__(self, vllm: Vllm, env: Mapping[str, str], cache_dir: Path) -> None:
        self._vllm = vllm
        self._env = {**ENV, **env}
        self._process: subprocess.Popen[str] | None = None
        self._cache_dir = cache_dir / "vllm" / "dry-run"

    def ask(self, model: Path, args: Mapping[str, Any]) -> DryRunOutcome:
        """What vLLM makes of `args` for the model in folder `model`."""
        words = ["--model", str(model), *self._vllm.command_line(args)]
        cached = self._cache_dir / f"{self._key(model, words)}.json"
        if cached.exists():
            return DryRunOutcome(**json.loads(cached.read_text()))
        outcome = self._ask(words)
        cached.parent.mkdir(parents=True, exist_ok=True)
        cached.write_text(json.dumps({"refusal": outcome.refusal, "resolved": outcome.resolved}))
        return outcome

    def _key(self, model: Path, words: Sequence[str]) -> str:
        config = (model / "config.json").read_text()
        parts = [self._vllm.python, self._vllm.version, PROBE.read_text(), config, *words]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]

    def _ask(self, words: Sequence[str]) -> DryRunOutcome:
        if self._process is None or self._process.poll() is not None:
            # It reads until its input ends, and so ends with this process, however that dies.
            self._process = subprocess.Popen(
                [self._vllm.python, str(PROBE), "dry-run"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=self._env,
                start_new_session=True,
            )
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(list(words)) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise InputError(f"vLLM {self._vllm.version} could not be asked; try `{self._vllm.python} {PROBE} dry-run`")
        return DryRunOutcome(**json.loads(answer))

    def close(self) -> None:
        if self._process:
            self._process.kill()
            self._process.wait()
