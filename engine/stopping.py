"""Stop requests: on SIGTERM, SIGINT (Ctrl-C) and SIGUSR1 (Slurm's warning) a run finishes its step and saves."""

import os
import signal
import threading
import time

from images.children import STATUS

AGAIN = 1  # seconds: the same request arrives twice if both a launcher and a terminal send it


class Stopped(Exception):
    """A signal stopped the run; the message says how to continue."""

    def __init__(self, signum, message):
        super().__init__(message)
        self.status = STATUS[signum]


class Requests:
    """A context in which `signum` is the first signal received, or 0; a second signal ends the process at once.

    Outside the main thread, where Python cannot catch signals, none is caught.
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
