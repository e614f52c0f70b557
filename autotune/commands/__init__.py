"""The commands: `autotune plan …` runs `plan.main` here; without a name, `tune.main` runs a trial or a study."""

import ast
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

NAMES = ("plan", "verify", "export", "compare", "report", "space", "log", "calibrate", "submission")
PARSED = ("log", "calibrate")  # they take flags, and argparse writes their help
HELP = {"--help", "-h"}
# Those of Hydra's flags that no value follows.
ALONE = {*HELP, "--hydra-help", "--multirun", "-m", "--run", "-r", "--resolve", "--shell-completion", "-sc"}


def usage(name: str, words: Sequence[str]) -> str | None:
    """The help of a command if `words` ask for it: its docstring, read without what the command imports."""
    if name in PARSED or not HELP & set(words):
        return None
    source = (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")
    return ast.get_docstring(ast.parse(source))


def mistake(words: Sequence[str]) -> str | None:
    """A line on the first word that is no command, no key=value, no flag and no flag's value; None without one."""
    for before, word in zip(["-m", *words], words, strict=False):
        is_value = before.startswith("-") and "=" not in before and before not in ALONE
        if "=" in word or word.startswith(("-", "~")) or is_value:
            continue
        close = get_close_matches(word, NAMES, 1)
        hint = "a command comes first" if word in NAMES else f"did you mean {close[0]}" if close else ""
        commands = f"the commands are {', '.join(NAMES)}"
        return "; ".join(filter(None, [f"{word!r} is no command and no key=value", hint, commands]))
    return None
