"""Where log lines go besides the terminal."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def log_to(path: Path, pattern: str = "%(message)s") -> Iterator[None]:
    """Everything that is logged, in this file, too."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter(pattern))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()
