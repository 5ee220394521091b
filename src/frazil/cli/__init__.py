"""The command line: `frazil <job> …`, generated from the parameters of the jobs.

Exit codes: 0 done, 1 failure, 2 bad input, 130 or 143 stopped by Ctrl-C or SIGTERM. Errors are one line, never a traceback.
"""
from __future__ import annotations

import atexit
import gc
import logging
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from typing import NoReturn

from cyclopts import App, CycloptsError

import frazil
from frazil.jobs import ACTIONS, JOBS


def build_app() -> App:
    """All commands with their help lines; the job of a command is imported when the command is used."""
    app = App(name="frazil", help="From particle images to a map. `frazil COMMAND --help` explains a command.", version=frazil.__version__,
              print_error=False, exit_on_error=False, result_action="return_value", suppress_keyboard_interrupt=False)  # fmt: skip
    for place, (job, line) in enumerate(JOBS.items()):
        if job not in ACTIONS:
            app.command(f"frazil.cli.commands:{job}", name=job, help=line, sort_key=place)
            continue
        group = App(name=job, help=line, sort_key=place)
        for inner, (action, text) in enumerate(ACTIONS[job].items()):
            group.command(f"frazil.cli.commands:{job}__{action}", name=action, help=text, sort_key=inner)
        app.command(group)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.captureWarnings(True)  # libraries' warnings belong in log.txt, not between the user's lines
    logging.getLogger("py.warnings").addHandler(logging.NullHandler())
    if arguments and not arguments[0].startswith("-") and arguments[0] not in JOBS:
        near = get_close_matches(arguments[0], JOBS, 1)
        guess = f" Did you mean {near[0]}?" if near else ""
        print(f'frazil: unknown command "{arguments[0]}".{guess} See `frazil --help`.', file=sys.stderr)
        return 2
    try:
        build_app()(arguments)
        sys.stdout.flush()
        return 0
    except CycloptsError as error:
        command = " ".join(["frazil", *arguments[:1]]) if arguments and arguments[0] in JOBS else "frazil"
        line = " ".join(str(error).split())
        print(f"{command}: {line} See `{command} --help`.", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `frazil … | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130
    except Exception as error:
        from frazil.cli.errors import explain  # imports torch: only now

        line, code = explain(error, arguments)
        print(line, file=sys.stderr)
        return code


def entry() -> NoReturn:
    """What the installed `frazil` script calls: main(), in a process that is its own.

    The modules of torch are a million objects that all stay: the collector of cycles does not look at them while they are loaded
    (commands.py switches it on again behind that), and they are not taken apart one by one at the end: 0.7 s of every command.
    """
    gc.disable()
    code = main()
    if any(thread is not threading.current_thread() and not thread.daemon for thread in threading.enumerate()):
        sys.exit(code)  # the long way, which waits for them
    atexit._run_exitfuncs()  # the clean-up of others: logs, temporary folders, process groups
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the reader has gone
            stream.flush()
    os._exit(code)
