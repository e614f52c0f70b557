"""Write a study's report again, one HTML page that needs no network, to report.html in the study's folder:

    autotune report study=demo

study               its name below multirun/, or its folder
--load 200          the report says how many GPUs serve 200 queries/s (or users) within the limits
price_per_gpu_hour  and what they cost; without it the study's own
"""

import sys
import time
from dataclasses import dataclass, replace

from omegaconf import MISSING

from autotune.config.bounds import positive
from autotune.config.command_line import errors_in_one_line, load_as_key, options
from autotune.config.overrides import with_fields
from autotune.results import report
from autotune.results.study import load
from autotune.search import account


@dataclass
class Report:
    study: str = MISSING
    target_load: float | None = positive(None)
    price_per_gpu_hour: float | None = positive(None)


def main() -> None:
    with errors_in_one_line():
        chosen = options(Report, load_as_key(sys.argv[1:]))
        began = time.monotonic()
        study = load(chosen.study)
        asked = {"target_load": chosen.target_load, "price_per_gpu_hour": chosen.price_per_gpu_hour}
        changed = with_fields(study.config, {key: value for key, value in asked.items() if value is not None})
        study = replace(study, config=changed)
        account.write(study)
        path = report.write(study)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, written in {time.monotonic() - began:.1f} s")


if __name__ == "__main__":
    main()
