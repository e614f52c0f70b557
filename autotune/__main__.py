"""The command line: `autotune` runs one trial, `autotune -m` a study, `autotune plan …` a module of `commands`.

It imports nothing but the command that is asked for: a study's own imports take a second.
"""

import sys
from importlib import import_module

from autotune import __version__, commands


def main() -> None:
    if "--version" in sys.argv:
        print(f"autotune {__version__}")
        return
    name = sys.argv.pop(1) if sys.argv[1:2] and sys.argv[1] in commands.NAMES else None
    if name and (usage := commands.usage(name, sys.argv[1:])):
        print(usage)
        return
    if not name and (mistake := commands.mistake(sys.argv[1:])):
        sys.exit(f"autotune: {mistake}")
    try:
        import_module(f"autotune.commands.{name or 'tune'}").main()
    except KeyboardInterrupt:  # while a command still imports what it needs
        sys.exit(130)


if __name__ == "__main__":
    main()
