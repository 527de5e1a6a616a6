"""Work in a thread of its own, told as a stream, that stops within one step."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any


class Stopped(BaseException):  # nothing in between may take it for a failure
    """Raised inside of the work when it is to stop."""


class Job:
    """One run that a visitor started: `stream` tells what it does, `stop` ends it.

    Once stopped it stays so: the work that a visitor starts next is a job of its own.
    """

    def __init__(self) -> None:
        self._stop = threading.Event()

    def stop(self) -> None:
        """End the work at its next report; safe from any thread, and more than once."""
        self._stop.set()

    @property
    def stopped(self) -> bool:
        return self._stop.is_set()

    def stream(self, work: Callable[[Callable[[Any], None]], Any]) -> Iterator[Any]:
        """Run ``work(tell)`` in a thread, and yield what it tells; None is not passed on.

        What it raises is raised here, `Stopped` aside, which ends the stream. Closing the stream
        stops the work, and waits for it.
        """
        told: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

        def tell(item: Any) -> None:
            if self.stopped:
                raise Stopped
            if item is not None:
                told.put(("told", item))

        def run() -> None:
            try:
                work(tell)
            except Stopped:
                pass
            except BaseException as error:
                told.put(("failed", error))
                return
            told.put(("done", None))

        thread = threading.Thread(target=run, name="guidancekit", daemon=True)
        thread.start()
        kind = "told"
        try:
            while True:
                kind, item = told.get()
                if kind == "done":
                    return
                if kind == "failed":
                    raise item
                yield item
        finally:
            if kind == "told":
                self.stop()
            thread.join()
