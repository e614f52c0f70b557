"""Restore a study from the trials that data/ keeps of it, so that `autotune verify` repeats them on another machine:

python benchmarks/h100/restore.py one-gpu/host-12/moe-twin multirun/moe baseline trial-2
"""

import argparse
from pathlib import Path

from autotune.config.command_line import compose
from autotune.measure import trial
from autotune.measure.result import Result
from benchmarks.h100.collect import DATA
from benchmarks.h100.tables import read


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kept", help="the study, below data/")
    parser.add_argument("folder", type=Path, help="of the restored one")
    parser.add_argument("trials", nargs="+", help="of the study")
    arguments = parser.parse_args()
    for name in arguments.trials:
        restore(read(DATA / arguments.kept / f"{name}.json"), arguments.folder / name)


def restore(result: Result, folder: Path) -> None:
    folder.mkdir(parents=True)
    config, _, _ = compose(list(dict.fromkeys(result.overrides)))  # a study names itself twice
    (folder / "config.yaml").write_text(trial.as_yaml(config))
    result.save(folder)


if __name__ == "__main__":
    main()
