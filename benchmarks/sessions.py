"""Conversations on real vLLM and simulated: do both find as many tokens in the prefix cache?

    python benchmarks/sessions.py FOLDER [overrides]

200 made-up conversations of 4 turns, whose prompts hold the answers that were received, on model=tiny. Prints the
tokens that vLLM's counter `prefix_cache_hits` has gained, and those of the simulation; exits with 1 if they differ by
more than 1 %.
"""

import sys
from pathlib import Path

from autotune.config.command_line import compose
from autotune.measure.prepare import prepare, prepare_samples
from autotune.measure.slot import Slot

RUN = [
    *("model=tiny", "scenario=sessions", "dataset=sessions", "dataset.count=200", "dataset.records.turns_deviation=0"),
    *("scenario.qps=10", "scenario.think_s=0.5", "scenario.min_duration_s=0", "scenario.min_queries=800"),
    "scenario.warmup_requests=0",
]
BACKENDS = {"live": ["engine.args.enforce_eager=true"], "sim": ["backend=sim", "backend/device=cpu"]}
MOST_APART = 0.01


def hits(name: str, overrides: list[str], folder: Path) -> int:
    """Tokens found in the prefix cache in a run on the backend called `name`."""
    config = compose([*RUN, *BACKENDS[name], *overrides])[0]
    prepared = prepare(config)
    samples = prepare_samples(config, prepared)
    folder.mkdir(parents=True, exist_ok=True)
    with prepared.backend.start(prepared.model, prepared.args, samples, folder, Slot()) as engine:
        run = engine.run(config.scenario, folder)
        assert len(run.requests) == 800 and not run.failed
    found, looked_for = (run.figures[f"prefix_{kind}_tokens"] for kind in ("hit", "query"))
    print(f"{name:5} {found:12,.0f} of {looked_for:,.0f} prompt tokens found in the prefix cache", flush=True)
    return int(found)


def main() -> None:
    folder, *overrides = sys.argv[1:]
    live, sim = (hits(name, overrides, Path(folder) / name) for name in BACKENDS)
    apart = abs(sim / live - 1)
    print(f"{apart:.2%} apart: target (at most {MOST_APART:.0%}) {'reached' if apart <= MOST_APART else 'MISSED'}")
    sys.exit(apart > MOST_APART)


if __name__ == "__main__":
    main()
