"""How a run is asked to stop: at SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (Slurm's warning) it ends the step and saves."""

import os
import signal
import threading
import time

from images.children import STATUS

AGAIN = 1  # seconds: the same request comes twice where a launcher and a terminal pass it on


class Stopped(Exception):
    """A run has stopped because a signal asked for it; the message says how to go on."""

    def __init__(self, signum, message):
        super().__init__(message)
        self.status = STATUS[signum]


class Requests:
    """While it is entered, `signum` is that of the first signal that asked to stop, 0 before; a second one ends it all.

    Outside the main thread, where Python cannot catch signals, nothing is caught.
    """

    def __enter__(self):
        self.signum, self.before = 0, {}
        if threading.current_thread() is threading.main_thread():
            self.before = {signum: signal.signal(signum, self._caught) for signum in STATUS}
        return self

    def __exit__(self, *_):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _caught(self, signum, _):
        now = time.monotonic()
        if self.signum and now - self.time > AGAIN:
            os._exit(128 + signum)
        if not self.signum:
            self.signum, self.time = signum, now
