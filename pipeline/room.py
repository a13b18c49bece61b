"""A room with a few places: many may be in it, or one who needs it whole."""

import contextlib
import threading
from collections.abc import Iterator


class Room:
    """`places` threads at once, or one alone. Who waits for the whole room lets nobody else in before."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._free = threading.Semaphore(places)
        self._door = threading.Lock()

    def place(self) -> contextlib.AbstractContextManager[None]:
        """Hold one place."""
        return self._hold(1)

    def whole(self) -> contextlib.AbstractContextManager[None]:
        """Hold all places: nobody else is in the room."""
        return self._hold(self._places)

    @contextlib.contextmanager
    def _hold(self, places: int) -> Iterator[None]:
        with self._door:  # one at a time, so that two who want the whole room do not wait for each other's half
            for _ in range(places):
                self._free.acquire()
        try:
            yield
        finally:
            self._free.release(places)
