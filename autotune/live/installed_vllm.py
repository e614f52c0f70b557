"""The installed vLLM: its version, its flags, its command line, and dry runs of a configuration. Takes no GPU."""

import atexit
import functools
import hashlib
import json
import os
import select
import subprocess
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from autotune.config import vllm_flags
from autotune.config.redact import redact
from autotune.config.vllm_flags import Flag
from autotune.errors import InputError
from autotune.measure.backend import DryRunOutcome
from autotune.system.files import last_line, write_whole
from autotune.system.process import GuardedProcess

Env = tuple[tuple[str, str], ...]  # names and values, hashable

VERSIONS_S = 60.0  # for an interpreter to start and find two packages
ANSWER_S = 600.0  # for the import of vLLM from a slow disk
PROBE = Path(__file__).with_name("probe.py")
# Where the environment forbids to write bytecode, Python would compile all of vLLM at each import.
ENV = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}


@dataclass(frozen=True)
class InstalledVllm:
    """The vLLM of one interpreter."""

    python: str
    version: str
    torch: str  # its version
    serve: list[str]  # `<python> *serve <model>` starts it
    flags: dict[str, Flag]  # of `vllm serve`, by name with underscores
    variables: frozenset[str] = frozenset()  # of the environment, that it reads
    env: Env = ()  # added to its environment
    cache_dir: Path = field(default_factory=Path)  # for the outcomes of dry runs

    def read(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """`args` as this vLLM reads them. Raises InputError for a flag or a value that it does not take."""
        return vllm_flags.read(args, self.flags, f"vLLM {self.version}")

    def check_variable(self, name: str) -> None:
        """Raise InputError for a variable of vLLM's by its name that it would ignore, or that would lock us out."""
        if name == "VLLM_API_KEY":
            raise InputError(f"backend.env.{name}: autotune's servers have a key of their own; leave it out")
        if name.startswith("VLLM_") and name not in self.variables:
            rest = {known.removeprefix("VLLM_"): known for known in sorted(self.variables)}
            longer = [known for known in rest.values() if known.startswith(name)][:3]
            close = longer or [rest[known] for known in get_close_matches(name.removeprefix("VLLM_"), rest, 1, 0.75)]
            flag = "see vllm/envs.py; perhaps it is a flag now (engine.args.…)"
            hint = f"did you mean {', '.join(close)}?" if close else flag
            raise InputError(f"backend.env.{name}: vLLM {self.version} reads no such variable; {hint}")

    def command_line(self, args: Mapping[str, Any]) -> list[str]:
        """Words for `vllm serve` that set `args`."""
        return vllm_flags.command_line(args, self.flags)

    def probe(self) -> "Probe":
        """Open this vLLM's interpreter for dry runs and return at once; the first dry run waits for its import."""
        return open_probe(self.python, self.env)

    def dry_run(self, model: Path, args: Mapping[str, Any]) -> DryRunOutcome:
        """Build vLLM's configuration for the model in folder `model` with flags `args`; outcomes are cached on disk."""
        words = self._words(model, args)
        return DryRunOutcome(**self._asked("dry-run", model, words, words))

    def change(self, model: Path, start: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Ask how a server that was started with the flags `start` becomes one with those `wanted`; see probe.plan."""
        words = {"start": self._words(model, start), "wanted": self._words(model, wanted)}
        return self._asked("change", model, words, [*words["start"], "", *words["wanted"]])

    def _words(self, model: Path, args: Mapping[str, Any]) -> list[str]:
        return ["--model", str(model), *self.command_line(args)]

    def _asked(self, kind: str, model: Path, question: Any, words: Sequence[str]) -> dict[str, Any]:
        """The probe's answer to a question about command lines for `model`, cached on disk.

        A configuration of which it dies is refused; that is asked again the next time.
        """
        shape = (model / "config.json").read_text()
        parts = [self.python, self.version, PROBE.read_text(), shape, *map(str, self.env), *words]
        key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
        cached = self.cache_dir / "vllm" / kind / f"{key}.json"
        if cached.exists():
            return dict(json.loads(cached.read_text()))
        try:
            answer: dict[str, Any] = redact(self.probe().ask(question))
        except InputError as error:
            return {"refusal": str(error), "resolved": {}}
        write_whole(cached, json.dumps(answer))
        return answer


class Probe:
    """An interpreter that imports vLLM once and answers questions about it; see probe.py."""

    def __init__(self, python: str, env: Env = ()) -> None:
        self.python = python
        # It reads until its input ends, and so it ends with this process, however that dies.
        self._process = subprocess.Popen(
            [python, str(PROBE), "answer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**ENV, **dict(env)},
            start_new_session=True,
        )
        atexit.register(self._process.kill)
        self._asked = threading.Lock()  # a dry run is asked for beside the change of a server

    def ask(self, question: Any) -> dict[str, Any]:
        """The answer to a question that probe.py lists. Raises InputError if there is none."""
        assert self._process.stdin and self._process.stdout
        with self._asked, suppress(BrokenPipeError, ValueError):  # it has ended, or is no Python
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            if select.select([self._process.stdout], [], [], ANSWER_S)[0]:
                return dict(json.loads(self._process.stdout.readline()))
        self._process.kill()
        self._process.wait()
        open_probe.cache_clear()  # the next question gets an interpreter that lives
        raise InputError(f"vLLM does not answer; see `echo '\"flags\"' | {self.python} {PROBE} answer`")


open_probe = functools.cache(Probe)  # one in a process: vLLM takes seconds to import


@functools.cache
def find_vllm(python: str, env: Env, cache_dir: Path) -> InstalledVllm:
    """The vLLM of `python`, its flags from the disk where its version was seen before. Raises InputError."""
    versions = _versions(python)
    key = hashlib.sha256(json.dumps([python, versions, PROBE.read_text()]).encode()).hexdigest()[:16]
    cached = cache_dir / "vllm" / f"{key}.json"
    if cached.exists():
        body = json.loads(cached.read_text())
    else:
        body = open_probe(python, env).ask("flags") | versions
        write_whole(cached, json.dumps(body, indent=1))
    return InstalledVllm(
        python=python,
        version=body["vllm"],
        torch=body["torch"],
        serve=body["serve"],
        flags={name: Flag(**flag) for name, flag in body["flags"].items()},
        variables=frozenset(body["variables"]),
        env=env,
        cache_dir=cache_dir,
    )


def _versions(python: str) -> dict[str, Any]:
    """The answer of `python` to `probe.py versions`. Raises InputError for whatever is no Python with vLLM."""
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with GuardedProcess([python, str(PROBE), "versions"], log, ENV, stop_timeout_s=1.0) as process:
            code = process.wait(VERSIONS_S)
        last = last_line(log, "it prints nothing")
    if code is None:
        last = f"no answer in {VERSIONS_S:g} s"
    elif code == 0:
        with suppress(ValueError):
            match json.loads(last):
                case {"vllm": str(), "torch": str(), "serve": list()} as body:
                    return dict(body)
    raise InputError(f"no usable vLLM for {python} ({last[:200]}); run `make setup`, or set backend.python")
