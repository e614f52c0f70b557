"""The command line: `autotune` runs one trial, `autotune -m` a study, `autotune plan …` a module of `commands`.

It imports nothing but the command that is asked for: a study's own imports take a second.
"""

import errno
import locale
import logging
import os
import select
import sys
import traceback
from importlib import import_module
from tempfile import NamedTemporaryFile

from autotune import __version__, commands
from autotune.config.redact import install, redact
from autotune.system.loopback import keep_off_proxies

UNEXPECTED = 70  # exit code: EX_SOFTWARE in sysexits.h
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENOENT)  # on the disk, or what is printed to
UNREAD = 141  # exit code of a command that SIGPIPE ends


def main() -> None:
    try:
        run()
        sys.stdout.flush()
    except KeyboardInterrupt:  # while a command still imports what it needs
        sys.exit(130)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and nobody_reads():
            sys.exit(UNREAD)
        if isinstance(error, OSError) and error.errno in NO_ROOM and not error.filename:
            drop_output()
            sys.exit(f"autotune: {error.strerror}")
        with NamedTemporaryFile("w", prefix="autotune-", suffix=".log", delete=False) as log:
            log.write(redact(traceback.format_exc()))
        print(f"autotune: unexpected {type(error).__name__}; please report it with {log.name}", file=sys.stderr)
        sys.exit(UNEXPECTED)


def run() -> None:
    if locale.getencoding().lower() != "utf-8" and not sys.flags.utf8_mode:  # this process's files and all others' are
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, sys.orig_argv)
    open_streams()
    logging.raiseExceptions = False  # a run goes on when nobody reads what it logs any more
    keep_off_proxies()
    install(sys.argv[1:])
    if "--version" in sys.argv:
        print(f"autotune {__version__}")
        return
    name = sys.argv.pop(1) if sys.argv[1:2] and sys.argv[1] in commands.NAMES else None
    if name and (usage := commands.usage(name, sys.argv[1:])):
        print(usage)
        return
    if not name and (mistake := commands.mistake(sys.argv[1:])):
        sys.exit(f"autotune: {mistake}")
    import_module(f"autotune.commands.{name or 'tune'}").main()


def nobody_reads() -> bool:
    """True if what is printed is read no more, as in `autotune --help | head`; the rest is dropped then."""
    printed = select.poll()
    printed.register(sys.stdout.fileno(), 0)
    if not printed.poll(0):
        return False
    drop_output()
    return True


def drop_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def open_streams() -> None:
    """Open standard streams that are closed, as after `>&-`: this process's own files would be taken for them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(number, "r" if name == "stdin" else "w"))


if __name__ == "__main__":
    main()
