"""The loop that the synchronous SDK runs on: one thread per process, started at the first call.

`run` is Ctrl-C safe: an exception in the waiting thread (KeyboardInterrupt above all) cancels the call in the
loop, waits for its clean-up, and is raised again. Decision: docs/decisions/0003-sync-twin.md.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")
CLEANUP_S = 15.0
"""How long an interrupted call may take to clean up."""

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None
_thread: threading.Thread | None = None


def _running_loop() -> asyncio.AbstractEventLoop:
    global _loop, _thread
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            _thread = threading.Thread(target=_loop.run_forever, name="rorqual-sandbox", daemon=True)
            _thread.start()
        return _loop


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Runs a coroutine on the SDK's loop and returns its value. Not for use inside that loop's callbacks."""
    loop = _running_loop()
    if threading.current_thread() is _thread:
        coroutine.close()
        raise RuntimeError("a Sandbox call inside a Sandbox callback would wait for itself: use AsyncSandbox")
    done: Future[T] = Future()
    task: asyncio.Task[T] | None = None

    def start() -> None:
        nonlocal task
        task = loop.create_task(coroutine)
        task.add_done_callback(finish)

    def finish(finished: asyncio.Task[T]) -> None:
        if finished.cancelled():
            done.set_exception(asyncio.CancelledError())
        elif (error := finished.exception()) is not None:
            done.set_exception(error)
        else:
            done.set_result(finished.result())

    def cancel() -> None:
        if task is not None:
            task.cancel()

    loop.call_soon_threadsafe(start)
    try:
        return done.result()
    except BaseException:
        if not done.done():
            loop.call_soon_threadsafe(cancel)
            with contextlib.suppress(BaseException):
                done.exception(timeout=CLEANUP_S)
        raise


def close() -> None:
    """Stops the loop. At exit; the next call starts a new one."""
    global _loop, _thread
    with _lock:
        loop, thread, _loop, _thread = _loop, _thread, None, None
    if loop is not None and thread is not None:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=5.0)
        if not thread.is_alive():
            # What still waits (a command that outlives its client) ends with the process: no word about it.
            loop.set_exception_handler(lambda *_: None)
            loop.close()


def _after_fork() -> None:
    global _lock, _loop, _thread
    _lock = threading.Lock()
    _loop = _thread = None


atexit.register(close)
os.register_at_fork(after_in_child=_after_fork)
