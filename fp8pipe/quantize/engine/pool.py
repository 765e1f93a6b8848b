"""Threads that run small tasks and stop at the first error.

A task may add tasks. Urgent ones go to the front of the queue, so that what was just measured is encoded while its
bytes are still in the page cache."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence

Task = Callable[[], None]


class Pool:
    """`threads` workers, each of which calls `prepare` first."""

    def __init__(self, threads: int, prepare: Task) -> None:
        self._tasks: deque[Task] = deque()
        self._changed = threading.Condition()
        self._running = 0
        self._closing = False
        self._error: BaseException | None = None
        self._prepare = prepare
        self._threads = [threading.Thread(target=self._work, name=f"quantize-{i}", daemon=True) for i in range(threads)]
        for thread in self._threads:
            thread.start()

    def add(self, tasks: Sequence[Task], then: Task | None = None, *, urgent: bool = False) -> None:
        """Queue `tasks`, at the front if `urgent`. The worker that finishes the last of them runs `then`."""
        if then is not None:
            tasks = _counted(tasks, then)
        with self._changed:
            if urgent:
                self._tasks.extendleft(reversed(tasks))
            else:
                self._tasks.extend(tasks)
            self._changed.notify_all()

    def check(self) -> None:
        """Raise the error that stopped the workers, if there was one."""
        if self._error is not None:
            raise self._error

    def drain(self) -> None:
        """Wait for all tasks, including those that tasks add; raise the first error."""
        with self._changed:
            while (self._tasks or self._running) and self._error is None:
                self._changed.wait(timeout=1)  # without a timeout, Ctrl-C would have to wait
        self.check()

    def close(self) -> None:
        """Drop the queued tasks and wait for the workers."""
        with self._changed:
            self._closing = True
            self._tasks.clear()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        self._prepare()
        while (task := self._next()) is not None:
            try:
                task()
            except BaseException as error:  # `drain` raises it in its own thread
                self._fail(error)
            finally:
                with self._changed:
                    self._running -= 1
                    if not self._running and not self._tasks:  # `drain` waits for that
                        self._changed.notify_all()

    def _next(self) -> Task | None:
        with self._changed:
            while not self._tasks and not self._closing:
                self._changed.wait()
            if self._closing:
                return None
            self._running += 1
            return self._tasks.popleft()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._tasks.clear()
            self._closing = True
            self._changed.notify_all()


def _counted(tasks: Sequence[Task], then: Task) -> list[Task]:
    """`tasks`, of which the one that ends last runs `then`; only `then` if there are none."""
    left = len(tasks)
    lock = threading.Lock()

    def wrap(task: Task) -> Task:
        def counted() -> None:
            nonlocal left
            task()
            with lock:
                left -= 1
                last = left == 0
            if last:
                then()

        return counted

    if not tasks:
        return [then]
    return [wrap(task) for task in tasks]
