"""List a search space beside vLLM's defaults: what makes vLLM compile again, and what it refuses of it:

    autotune space model=smollm2 space=[scheduler,memory]

Takes the words of a study, and shows what they would sweep. With backend=sim it needs no vLLM.
"""

import sys

from autotune.config.command_line import compose, errors_in_one_line
from autotune.config.vllm_flags import FLAG
from autotune.measure.backend import DryRunOutcome
from autotune.measure.prepare import Prepared, prepare
from autotune.search.checks import check_space
from autotune.search.distributions import Distribution, describe, ends
from autotune.search.space import default_of, parse, swept_flags
from autotune.text import aligned, shorten


def main() -> None:
    with errors_in_one_line():
        config, params, sweeps = compose(sys.argv[1:])
        space, _ = parse(params, sweeps, config.conditions, config.only_if)
        prepared = prepare(config)
        outcome = prepared.dry_run()
        space = check_space(space, config, prepared.backend, outcome.resolved)
    rows = [("parameter", "values", "vLLM's default", "other values" if outcome.compiled else "")]
    refused = []
    for name, distribution in space.parameters.items():
        found = default_of(name, outcome.resolved)
        default = "" if not name.startswith(FLAG) else "set by vLLM" if found is None else found
        condition = f"  only if {space.only_if[name]}" if name in space.only_if else ""
        alone = alone_of(prepared, name, distribution)
        compiles = any(one.compiled not in ("", outcome.compiled) for one in alone.values())
        rows.append((name, describe(distribution) + condition, str(default), "compile again" if compiles else ""))
        refused += [f"refused: {value}: {one.refusal}" for value, one in alone.items() if one.refusal]
    print("\n".join(aligned(rows, left=True)))
    for name, expression in space.conditions.items():
        print(f"condition {name}: {expression}")
    if outcome.refusal:
        print(f"vLLM refuses this configuration before anything is swept: {outcome.refusal}")
    elif refused:
        print("\n".join(refused))


def alone_of(prepared: Prepared, name: str, distribution: Distribution) -> dict[str, DryRunOutcome]:
    """Dry runs of each choice of a flag, or of a range's ends, beside its defaults, by `flag=value`."""
    if not name.startswith(FLAG):
        return {}
    values = {shorten({name: value}): {name: value} for value in ends(distribution)}
    return {written: prepared.dry_run(swept_flags(params, prepared.args)) for written, params in values.items()}


if __name__ == "__main__":
    main()
