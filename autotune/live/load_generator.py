"""The processes that make LoadGen runs; they stay warm from one run to the next, whichever server each is for."""

import json
import os
import select
import socket
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from autotune.config.schema import LiveConfig, ScenarioConfig
from autotune.data.samples import Samples
from autotune.live import key
from autotune.system.files import last_line, write_whole
from autotune.system.process import GuardedProcess, Stoppable

PATH_BYTES = 4096  # of a run's folder, at most, in a message that asks for the run
STOP = b"stop"  # a message: end the run
WARMUP_ROUNDS = 10  # of a server that has just started, at most


@dataclass(frozen=True)
class RunSpec:
    """run.json: one LoadGen run. Fields named as in LiveConfig are its, with null resolved."""

    folder: Path  # for LoadGen's logs, requests.csv and client.json
    url: str  # of vLLM's server
    model: str  # the name that it serves
    scenario: ScenarioConfig
    request_timeout_s: float
    client_processes: int = 1
    connections: int = 1024  # to the server, at most, of all client processes; other requests wait for one
    max_model_len: int | None = None  # vLLM's; null: it is not known
    keep_answers: bool = False  # LoadGen gets each answer's token ids, as int32, rather than only their number
    client_cpu_limit: float = LiveConfig.client_cpu_limit
    client_ttft_share: float | None = None  # null: what the client adds to TTFT is recorded, not judged
    warmup_rounds: int = WARMUP_ROUNDS  # of scenario.warmup_requests, at most
    total: int = 0  # queries that LoadGen is going to issue, at most; 0 where no limits are tested
    has_metrics: bool = True  # vLLM's; false with its disable_log_stats

    def save(self, path: Path) -> None:
        write_whole(path, json.dumps(asdict(self), indent=1, default=_plain))

    @classmethod
    def load(cls, path: Path) -> "RunSpec":
        fields = json.loads(path.read_text())
        scenario = OmegaConf.to_object(OmegaConf.merge(ScenarioConfig, fields["scenario"]))
        return cls(**{**fields, "folder": Path(fields["folder"]), "scenario": scenario})


def _plain(value: Any) -> str:
    return value.name if isinstance(value, Enum) else str(value)


@dataclass(frozen=True)
class ClientReport:
    """client.json."""

    failed: int
    errors: list[str]  # the first few, in the server's words
    began: float  # the run, on time.perf_counter's clock, which all processes of a machine share
    warmup_s: float
    run_s: float
    stopped: bool  # before LoadGen's own end
    processes: list[dict[str, float]] = field(default_factory=list)  # each one's client.ProcessReport
    figures: dict[str, float] = field(default_factory=dict)  # named as in result.json
    reasons: list[str] = field(default_factory=list)  # why the client makes the run INVALID


class LoadGenerator(Stoppable):
    """Makes LoadGen runs over `samples`, one at a time; see loadgen.py. It may outlive a trial and its server.

    It prepares the samples' requests at once, and again if its process has died. Leaving the `with` block ends all of
    its processes; so does the death of this process.
    """

    def __init__(self, samples: Samples, log: Path) -> None:
        """Begin to prepare; `log` gets what its processes print outside a run."""
        self._samples, self._log = samples, log
        self._run = Path()  # the folder of the run that was begun last
        self._runs = False  # whether it goes on
        self._start()

    def _start(self) -> None:
        self._words, theirs = socket.socketpair(type=socket.SOCK_SEQPACKET)
        with theirs:
            samples = str(self._samples.path.resolve())
            command = [sys.executable, "-m", "autotune.live.loadgen", samples, str(theirs.fileno())]
            keep = [theirs.fileno()]
            self._process = GuardedProcess(command, self._log, key.environment(), stop_timeout_s=1.0, keep=keep)

    def begin(self, spec: RunSpec) -> None:
        """Begin the run; `wait` for it, or `cancel` it, before the next one."""
        if self._process.exit_code() is not None:
            self.stop()
            self._start()
        spec.save(spec.folder / "run.json")
        self._run, self._runs = spec.folder, True
        with suppress(ConnectionError):  # `wait` will tell
            self._words.send(os.fsencode(spec.folder.resolve()))

    def wait(self, timeout_s: float) -> int | None:
        """The run's exit code, 128 + n if signal n ended it; None if it still goes on after `timeout_s`."""
        words = self._words.fileno()
        ready = select.select([words, self._process.fileno()], [], [], timeout_s)[0]
        if not ready:
            return None
        code = b""
        if words in ready:
            with suppress(ConnectionError):  # they died with a word unread
                code = self._words.recv(PATH_BYTES)
        ended = int(code) if code else self._process.wait(timeout_s)  # all have died
        self._runs = ended is None
        return ended

    def cancel(self) -> None:
        """End the run in its middle, if one goes on: the server sees its connections close."""
        if self._runs:
            with suppress(ConnectionError):  # all have ended
                self._words.send(STOP)
        while self._runs:
            self.wait(timeout_s=1.0)

    def last_line(self) -> str:
        """The last line that the run printed."""
        return last_line(self._run / "loadgen.log", f"see {self._log}")

    def stop(self) -> None:
        self._process.stop()
        self._words.close()
