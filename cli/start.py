"""The program's entry: Ctrl-C is answered from the first line on, and no file takes the place of a closed stream."""

import os
import signal
import sys

from .interrupt import stop


def main() -> None:
    """Run the command line, and exit with its code."""
    asked = signal.getsignal(signal.SIGINT) is not signal.SIG_IGN  # as under nohup
    if asked:
        signal.signal(signal.SIGINT, stop)
    closed = [stream for stream in (0, 1, 2) if not _is_open(stream)]
    while any(not _is_open(stream) for stream in closed):
        os.open(os.devnull, os.O_RDWR)  # which is the lowest that is free
    if 1 in closed:
        os.write(2, b"error: Standard output is closed.\n  hint: send it away with > /dev/null\n")
        sys.exit(2)
    try:
        os.getcwd()  # noqa: PTH109 (pathlib takes longer to import)
    except FileNotFoundError:
        os.write(2, b"error: The current folder was deleted.\n  hint: go to one that is there: cd ~\n")
        sys.exit(2)
    from .app import main as run_app

    code = 130
    try:
        code = run_app()
        sys.stdout.flush()
    except OSError:  # a full disk, which has been told where there was more to say
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 2
    finally:
        if asked:
            signal.signal(signal.SIGINT, stop)
    sys.exit(code)


def _is_open(stream: int) -> bool:
    try:
        os.fstat(stream)
    except OSError:
        return False
    return True
