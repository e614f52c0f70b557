"""Keep what a page's tables are made of:

    python benchmarks/h100/collect.py FOLDER one-gpu/host-6|two-gpus [STUDY …]

Copies result.json of each trial below FOLDER/multirun to data/one-gpu/host-6/<study>/<trial>.json beside this file,
without paths of the machine where it was measured, with what autotune.verify says and what the step `killed` printed.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

from autotune.results.submission import LOGS

DATA = Path(__file__).parent / "data"
CUT_OFF = ("SystemExit", "KeyboardInterrupt")  # how a trial that was stopped with its study begins its reason
RUN_FIGURES = (
    "duration_s",
    "requests",
    "samples_per_s",
    "tokens_per_s",
    "ttft_p50_ms",
    "ttft_p99_ms",
    "tpot_p50_ms",
    "tpot_p99_ms",
    "step_ms",
    "tokens_per_step",
    "gpu_utilization",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("place", help="below data/: one-gpu/<host> or two-gpus")
    parser.add_argument("studies", nargs="*", help="without them, all that were not simulated")
    parser.add_argument("--data", type=Path, default=DATA)
    arguments = parser.parse_args()
    multirun, data = arguments.folder / "multirun", arguments.data / arguments.place
    studies = arguments.studies or [path.name for path in multirun.glob("*") if not path.name.endswith("-sim")]
    for study in studies:
        trials = multirun / study
        for file in [*trials.glob("*/result.json"), *trials.glob("verify/*/result.json")]:
            body = json.loads(file.read_text())
            if body["reason"].startswith(CUT_OFF):
                continue
            place = data / file.parent.relative_to(multirun)
            if body["deviations"]:  # from MLPerf's rules, by which it ran, as its log shows
                place = data / "by-rules" / place.name
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy(file.parent / LOGS[1], place)
            keep(file, place.with_suffix(".json"))
        if (verdict := multirun / study / "verify.json").exists():
            keep(verdict, data / study / "verify.json")
    if (killed := arguments.folder / "done" / "killed").exists():
        said = [line for line in killed.read_text().splitlines() if re.search(r"empty after|is free|no process", line)]
        (data / "killed.txt").write_text("\n".join(said) + "\n")


def keep(source: Path, target: Path) -> None:
    body = json.loads(re.sub(r"(?<![\w.])/[^\s\"']*/", "", source.read_text()))
    for run in body.get("runs", []):  # of the runs that a trial is made of, what the tables and calibrate use
        run["metrics"] = {name: value for name, value in run["metrics"].items() if name in RUN_FIGURES}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
