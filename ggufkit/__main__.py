"""The command `ggufkit`, and `python -m ggufkit`."""

import os
import signal
from typing import NoReturn


def main() -> NoReturn:
    """Entry point: Ctrl-C ends it without a word from its first moment on."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not ignored, as behind nohup
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from .cli import main

    main()


if __name__ == "__main__":
    main()
