"""What all processes of a run share: where they import from, which signals stop them, and that they end together."""

import os
import signal
import sys
import threading
import time

STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 0}  # the exit status of a run that each stops
PARENT = os.getppid()  # at the time of import


def import_safely():
    """Make every Python that this process starts import from where this one does, never from the current folder.

    Raises ValueError if environment variables cannot say so.
    """
    if sys.flags.ignore_environment and not sys.flags.safe_path:
        raise ValueError('python -E: what it starts would import from the current folder; leave -E out, or add -P')
    odd = [path for path in sys.path if os.pathsep in path]
    if odd:
        raise ValueError(f'{odd[0]} has a {os.pathsep} in its name: what is started could not import from there')
    os.environ['PYTHONSAFEPATH'] = '1'
    os.environ['PYTHONPATH'] = os.pathsep.join(path for path in sys.path if path)


def end_with_parent(parent, message=''):
    """Print a message and end this process within seconds after `parent`, which started it, dies for any reason."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        if message:
            print(message, file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
