"""List the parameters of a search space beside vLLM's defaults:

autotune space model=smollm2 space=[scheduler,memory]
"""

import sys

from autotune.config.command_line import compose, errors_in_one_line
from autotune.config.vllm_flags import FLAG
from autotune.measure.prepare import prepare
from autotune.search.space import check_space, default_of, describe, parse
from autotune.text import aligned


def main() -> None:
    with errors_in_one_line():
        config, params, sweeps = compose(sys.argv[1:])
        space, _ = parse(params, sweeps, config.conditions, config.only_if)
        prepared = prepare(config)
        outcome = prepared.dry_run()
        space = check_space(space, config, prepared.backend, outcome.resolved)
    rows = [("parameter", "values", "vLLM's default")]
    for name, distribution in space.parameters.items():
        found = default_of(name, outcome.resolved)
        default = "" if not name.startswith(FLAG) else "set by vLLM" if found is None else found
        condition = f"  only if {space.only_if[name]}" if name in space.only_if else ""
        rows.append((name, describe(distribution) + condition, str(default)))
    print("\n".join(aligned(rows, left=True)))
    for name, expression in space.conditions.items():
        print(f"condition {name}: {expression}")
    if outcome.refusal:
        print(f"vLLM refuses this configuration before anything is swept: {outcome.refusal}")


if __name__ == "__main__":
    main()
