"""A value that is made at its first use, once, also when several threads ask at the same time: a model's weights."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Once(Generic[T]):
    """Call it to get the value. Pickles as "not made yet", so that an encoder can travel without its weights."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._made: list[T] = []

    def __call__(self) -> T:
        if not self._made:
            with self._lock:
                if not self._made:
                    self._made.append(self._make())
        return self._made[0]

    def __reduce__(self) -> tuple[type["Once[T]"], tuple[Callable[[], T]]]:
        return Once, (self._make,)
