"""Output that never raises: the console may lack a character, be full, closed or gone, and the run goes on."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

NOWHERE = Path(os.devnull)


class TolerantStream:
    r"""A text stream that raises no error when it can't be written to: the text is lost, and nothing else happens.

    Characters that the stream's encoding lacks appear as \xe4 or \udce9. Whatever is not defined here is the wrapped
    stream's.
    """

    def __init__(self, stream: TextIO | None) -> None:
        """Wrap a stream and make it escape characters that it can't encode; None (a closed stream) drops all text."""
        self._stream = stream if stream is not None else NOWHERE.open("w", encoding="utf-8")
        with suppress(AttributeError, ValueError):  # a notebook's stream has no encoding
            self._stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Write text if that is possible; return its length in any case."""
        with suppress(OSError, ValueError):  # ValueError: closed within this process
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush if that is possible."""
        with suppress(OSError, ValueError):
            self._stream.flush()

    def flush_or_abandon(self) -> None:
        """Flush the stream; if that fails, redirect its file descriptor to the null device.

        Python flushes the streams once more when it exits, and an error there would change the exit code to 120.
        """
        try:
            self._stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError), NOWHERE.open("wb") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


@contextmanager
def tolerant_console() -> Iterator[None]:
    """Return a context in which nothing that is printed raises an error, whatever becomes of stdout and stderr."""
    # A descriptor that was closed before the start would be given to the next file that is opened, which would then
    # receive the messages of libraries.
    for descriptor in (1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            if nowhere == descriptor:
                os.set_inheritable(nowhere, True)  # for the programs that this one starts
            else:
                os.dup2(nowhere, descriptor)
                os.close(nowhere)

    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(TolerantStream, before)
    try:
        yield
    finally:
        sys.stdout.flush_or_abandon()
        sys.stderr.flush_or_abandon()
        sys.stdout, sys.stderr = before
