"""SIGTERM, as schedulers send it before they kill: stop after the epoch that runs."""

import contextlib
import signal
from collections.abc import Callable, Generator

from benchmarks.commandline import guarded


class Preempted(Exception):
    """Training has stopped early; what it did is saved."""


@contextlib.contextmanager
def watched() -> Generator[Callable[[], bool], None, None]:
    """Give a function that says whether SIGTERM has come; nothing else happens then."""
    received = []

    def receive(number: int, frame: object) -> None:
        del frame
        received.append(number)

    before = signal.signal(signal.SIGTERM, receive)
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, before)


def resumable(run: Callable[[Callable[[], bool]], None]) -> int:
    """Run a command that SIGTERM stops early and `--resume` continues.

    Args:
        run: what to do; it is given a function that says whether SIGTERM has come.

    Returns:
        The exit code: 0 if SIGTERM has stopped it, too.
    """
    try:
        with watched() as stopping:
            return guarded(
                lambda: run(stopping),
                extras="train,plot",
                remedy="continue with --resume",
            )
    except Preempted as stopped:
        print(f"stopped by SIGTERM: {stopped}; continue with --resume")
        return 0
