"""How does long work leave the interpreter to the calls of other threads? By a short rest now and then.

A thread that computes gives the interpreter away only when another has waited for 5 ms (sys.getswitchinterval), and a
call waits for it several times. A rest of a moment lets all that wait have their turn.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
EVERY = 32
"""Of things that take some ten microseconds each: nobody waits for much longer than a third of a millisecond."""
REST = 50e-6
"""Seconds; the kernel makes about twice that of it."""


def resting(values: Iterable[T]) -> Iterator[T]:
    """`values`, with a rest after each EVERY. For loops over endpoints on a thread that serves no calls; never under a
    lock that calls take."""
    for number, value in enumerate(values, 1):
        yield value
        if not number % EVERY:
            time.sleep(REST)
