"""SIGTERM, as schedulers send it before they kill: stop behind the epoch that runs."""

import contextlib
import signal
from collections.abc import Callable, Generator


class Preempted(Exception):
    """Training has stopped early; what it did is saved."""


@contextlib.contextmanager
def watched() -> Generator[Callable[[], bool], None, None]:
    """Give a function that says whether SIGTERM has come, which kills nothing here."""
    received = []

    def receive(number: int, frame: object) -> None:
        del frame
        received.append(number)

    before = signal.signal(signal.SIGTERM, receive)
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, before)
