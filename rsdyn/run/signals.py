"""Signals that end a run: what was done is saved, every process leaves, and the exit code says why.

Lightning answers SIGTERM by exiting with 0, and with several processes its handler takes part in a broadcast that can
wait for ever. Here a handler does nothing but note the signal, pass it on to the other processes of the run, and, where
nothing can be lost, raise :class:`Interrupted`. While steps are taken (``deferred``) the training loop looks at the
note between two steps, all processes agree, save, and leave together (``rsdyn/run/checkpoints.py``).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from types import FrameType
from typing import Any

from rsdyn.ranks import is_rank_zero

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # Ctrl-C, kill, SLURM's warning before the time is up
PARENT_VARIABLE = "RSDYN_PARENT"
GRACE = 10.0  # seconds that a process has to leave by itself before it is ended


class Interrupted(BaseException):
    """A signal asked the run to end; ``exit_code`` is 128 and its number. No Exception, so that nothing swallows it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class Stop:
    """The wish to end, for one process of a run.

    Attributes:
        signum: the signal that came first; later ones change nothing, so none can cut a save short.
        deferred: while True the handler only takes note, else it raises :class:`Interrupted` where the signal met the
            program.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.deferred = False
        self._before: dict[int, Any] = {}
        self._children: list[subprocess.Popen[Any]] = []
        self._parent: int | None = None
        self._pipe = (-1, -1)
        self._closing = False

    # -- signals -------------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Take the signals over, until :meth:`restore`. Does nothing outside the main thread, where none arrives."""
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in SIGNALS:
            self._before[signum] = signal.signal(signum, self._take_note)
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        self._pipe = writing, signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reading,), daemon=True, name="rsdyn-signals").start()
        if is_rank_zero():
            os.environ[PARENT_VARIABLE] = str(os.getpid())  # for the processes that Lightning starts from this one
        elif os.environ.get(PARENT_VARIABLE) == str(os.getppid()):
            self._parent = os.getppid()
            threading.Thread(target=self._watch_parent, daemon=True, name="rsdyn-parent").start()

    def restore(self) -> None:
        """Give the signals back to whoever had them."""
        self._closing = True
        if not self._before:
            return
        for signum, handler in self._before.items():
            signal.signal(signum, handler if handler is not None else signal.SIG_DFL)
        self._before = {}
        writing, before = self._pipe
        signal.set_wakeup_fd(before)
        os.close(writing)  # which ends the thread that reads
        if is_rank_zero():
            os.environ.pop(PARENT_VARIABLE, None)

    def _take_note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            return
        self.signum = signum
        if not self.deferred:
            raise Interrupted(signum)
        if is_rank_zero():  # not print: the signal may have come in the middle of one
            os.write(
                2, f"\n{signal.Signals(signum).name}: saving after this step; a second one changes nothing\n".encode()
            )

    def _listen(self, reading: int) -> None:
        """Pass each signal on, at once.

        Python runs a handler only when the main thread comes back from whatever it
        waits for, which may be a process that has not heard of the signal. One that never comes back is ended.
        """
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            passed_on = False
            while arrived := pipe.read(1):
                if passed_on or arrived[0] not in SIGNALS:
                    continue
                passed_on, signum = True, arrived[0]
                for process in self._children:
                    process.send_signal(signum)
                if self._parent is not None and os.getppid() == self._parent:
                    os.kill(self._parent, signum)
                threading.Thread(target=self._insist, args=(signum,), daemon=True, name="rsdyn-insist").start()

    def _insist(self, signum: int) -> None:
        end = time.monotonic() + GRACE
        while time.monotonic() < end and not self._closing:
            time.sleep(0.1)
        if self.signum is None and not self.deferred and not self._closing:
            self._leave(f"{signal.Signals(signum).name}, and it waits for something that does not come", 128 + signum)

    def check(self) -> None:
        """Raise :class:`Interrupted` if a signal came and nothing defers it."""
        if self.signum is not None and not self.deferred:
            raise Interrupted(self.signum)

    def leave(self) -> None:
        """Raise :class:`Interrupted` if a signal came, deferred or not."""
        self.deferred = False
        self.check()

    # -- the other processes of a run that Lightning started from this one ---------------------------------------------

    def adopt(self, processes: Iterable[subprocess.Popen[Any]]) -> None:
        """Answer for the processes started from this one: signals reach them, and their failure ends this one too.

        Lightning's own observer would end this process with SIGKILL as soon as another leaves with anything but 0,
        as all do after a signal.
        """
        self._children = list(processes)
        if self._children:
            threading.Thread(target=self._watch_children, daemon=True, name="rsdyn-children").start()
        if self.signum is not None:  # it came before they were there
            for process in self._children:
                process.send_signal(self.signum)

    def failure(self, wait: float = 0.0) -> tuple[int, int] | None:
        """(which, exit code) of a process started from this one that failed, if any did within ``wait`` seconds."""
        end = time.monotonic() + wait
        while True:
            for i, process in enumerate(self._children, start=1):
                if process.poll():
                    return i, int(process.returncode)
            if time.monotonic() >= end or all(process.poll() == 0 for process in self._children):
                return None
            time.sleep(0.05)

    def end_children(self, grace: float = GRACE) -> None:
        """Give the processes started from this one ``grace`` seconds to end, then end them: none outlives the run."""
        self._closing = True
        end = time.monotonic() + grace
        for process in self._children:
            try:
                process.wait(max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _watch_children(self) -> None:
        """End this process if another failed and it did not notice, as one that waits for the other's data may not."""
        while not self._closing:
            failed = self.failure()
            if failed is not None:
                end = time.monotonic() + GRACE
                while not self._closing:
                    if time.monotonic() > end:
                        self._leave(f"process {failed[0] + 1} {how_it_ended(failed[1])}", exit_code_of(failed[1]))
                    time.sleep(0.2)
            time.sleep(0.2)

    def _watch_parent(self) -> None:
        while os.getppid() == self._parent:
            time.sleep(0.5)
        time.sleep(GRACE / 2)  # if it had something to wait for, that has failed by now
        if not self._closing:
            self._leave("the first process is gone", 1)

    def _leave(self, why: str, code: int) -> None:
        print(f"rsdyn: {why}; this process ends too.", file=sys.stderr, flush=True)
        for process in self._children:
            process.kill()
        os._exit(code)


def how_it_ended(code: int) -> str:
    """An exit code in words: ``was killed (SIGKILL)`` or ``ended with code 3``."""
    return f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"


def exit_code_of(code: int) -> int:
    """The code that a run ends with when one of its processes ended with ``code``: the same, or 1 for a killed one."""
    return code if code > 0 else 1
