"""Configuration: the schema, the command line, vLLM's flags, what is secret."""

from pathlib import Path

PACKAGE = Path(__file__).parents[1]
# A wheel has it in the package, a checkout beside it.
CONF = next(folder for folder in (PACKAGE / "conf", PACKAGE.parent / "conf") if folder.is_dir())
