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
        raise ValueError('python -E: its child processes would import from the current folder; leave -E out, or add -P')
    split = [path for path in sys.path if os.pathsep in path]
    if split:
        raise ValueError(f'{split[0]} has a {os.pathsep} in its name: child processes could not import from it')
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
