"""What the processes of a run have in common: where they import from, what stops them, and that they end together."""

import os
import signal
import sys
import threading
import time

STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 0}  # what a run that each has stopped exits with
PARENT = os.getppid()  # when this module is imported


def import_safely():
    """Let every Python that this process starts import from where this one does, and never from the current folder.

    Raises ValueError where a variable of the environment cannot tell them.
    """
    if sys.flags.ignore_environment and not sys.flags.safe_path:
        raise ValueError('python -E: what it starts would import from the current folder; leave -E out, or add -P')
    odd = [path for path in sys.path if os.pathsep in path]
    if odd:
        raise ValueError(f'{odd[0]} has a {os.pathsep} in its name: what is started could not import from there')
    os.environ['PYTHONSAFEPATH'] = '1'
    os.environ['PYTHONPATH'] = os.pathsep.join(path for path in sys.path if path)


def end_with_parent(parent, message=''):
    """End this process within seconds once `parent`, which started it, has died in whatever way, with a message."""

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        if message:
            print(message, file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
