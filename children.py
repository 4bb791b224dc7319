"""What the processes that a run starts have in common: where they import from, and that they end with their parent."""

import os
import sys
import threading
import time


def import_safely():
    """Let every Python that this process starts import from where this one does, and never from the current folder."""
    os.environ['PYTHONSAFEPATH'] = '1'
    os.environ['PYTHONPATH'] = os.pathsep.join(path for path in sys.path if path)


def end_with_parent(message=''):
    """End this process within seconds once the one that started it has died, however it did; the message says so."""
    parent = os.getppid()

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        if message:
            print(message, file=sys.stderr, flush=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
