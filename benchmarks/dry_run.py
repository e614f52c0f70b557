"""Does the dry run say what vLLM does?

    python benchmarks/dry_run.py --points 200 --starts 12

Draws random points of space=all for model=tiny, asks the dry run about each, then starts real vLLM on some that
it passes and some that it refuses. As many points again are without the choices that are refused on their own, such
as parallelism without GPUs: nearly none would pass. Prints both counts, and every point on which the two disagree;
exits with 1 then.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import CategoricalDistribution

from autotune.config.command_line import compose
from autotune.errors import StartError
from autotune.live.backend import LiveBackend
from autotune.live.server import serve
from autotune.measure.prepare import Prepared, prepare
from autotune.search.distributions import Distribution
from autotune.search.space import Space, parse, swept_flags


def possible(space: Space, prepared: Prepared) -> Space:
    """`space` without the choices that the dry run refuses on their own."""
    kept: dict[str, Distribution] = {}
    for name, one in space.parameters.items():
        if not isinstance(one, CategoricalDistribution):
            kept[name] = one
        elif choices := [choice for choice in one.choices if not why_refused(prepared, {name: choice})]:
            kept[name] = CategoricalDistribution(choices)
    return replace(space, parameters=kept)


def why_refused(prepared: Prepared, params: dict[str, Any]) -> str:
    return prepared.dry_run(swept_flags(params, prepared.args)).refusal


def points(prepared: Prepared, space: Space, count: int, seed: int) -> list[tuple[dict[str, Any], str]]:
    """`count` random flags that the space's own conditions allow, each with the dry run's refusal."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    known = prepared.args | prepared.backend.dry_run(prepared.model, prepared.args).resolved
    found: list[tuple[dict[str, Any], str]] = []
    while len(found) < count:
        chosen = space.suggest(study.ask(), known)
        if not space.violated(chosen, known):
            args = swept_flags(chosen, prepared.args)
            found.append((args, prepared.backend.dry_run(prepared.model, prepared.args | args).refusal))
    return found


def start(prepared: Prepared, flags: dict[str, Any]) -> str:
    """Why real vLLM does not start with `flags`; empty if it does."""
    backend = prepared.backend
    assert isinstance(backend, LiveBackend)
    with tempfile.TemporaryDirectory() as folder:
        try:
            with serve(backend.config, backend.vllm, prepared.model, prepared.args | flags, Path(folder, "vllm.log")):
                return ""
        except StartError as error:
            return str(error)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--starts", type=int, default=12, help="real starts of each kind, passed and refused")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    config, params, _ = compose(["model=tiny", "space=all", "+engine.args.enforce_eager=true"])
    prepared = prepare(config)
    space, _ = parse(params, [], config.conditions, config.only_if)
    spaces = (space, possible(space, prepared))
    drawn = [point for one in spaces for point in points(prepared, one, options.points, options.seed)]
    passed = [args for args, refusal in drawn if not refusal]
    refused = [(args, refusal) for args, refusal in drawn if refusal]
    print(f"{len(drawn)} points: the dry run passes {len(passed)}, refuses {len(refused)}", flush=True)
    wrong = 0
    for args in passed[: options.starts]:
        why = start(prepared, args)
        wrong += bool(why)
        print(f"passed, vLLM {'REFUSES: ' + why if why else 'starts'}  {json.dumps(args)}", flush=True)
    for args, refusal in refused[: options.starts]:
        why = start(prepared, args)
        wrong += not why
        print(f"refused ({refusal}), vLLM {'refuses' if why else 'STARTS'}  {json.dumps(args)}", flush=True)
    print(f"{wrong} of {min(len(passed), options.starts) + min(len(refused), options.starts)} real starts disagree")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
