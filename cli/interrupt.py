"""What Ctrl-C does before there is something to clean up."""

import os


def stop(*_: object) -> None:
    """Exit at once: an exception would be lost in some libraries' imports."""
    cursor = b"\x1b[?25h" if os.isatty(2) else b""  # which a spinner hides
    os.write(2, cursor + b"interrupted\n")
    os._exit(130)
