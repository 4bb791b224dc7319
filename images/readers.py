"""Processes that read batches of images for the training process, started once and kept over epochs.

They share memory outside /dev/shm, of which a container may have little, and no lock: each has its own connection, so
that its death is noticed at once and blocks no other process.
"""

import atexit
import contextlib
import functools
import itertools
import math
import mmap
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import signal
import sys
import tempfile
import traceback
import types
import warnings
from multiprocessing.connection import wait
from multiprocessing.reduction import recv_handle, send_handle

import numpy as np
import torch

from formats.faults import is_of_the_machine
from images import children
from images.children import STATUS
from images.shared import Shared, memory

SLOTS = 2  # batches that a process has memory for: it reads one while another waits to be used
ENDING = 2  # seconds that a process has to end by itself


@functools.cache
def context():
    """The multiprocessing context of loader processes: they are forked from a server without threads.

    A fork of this process sooner or later inherits a lock held by a thread (of autograd or gloo) that it does not have,
    and waits forever. Raises ValueError if TMPDIR is too long for the server's socket.
    """
    forkserver = multiprocessing.get_context('forkserver')
    forkserver.set_forkserver_preload(['images.photographs'])
    children.import_safely()
    warnings.filterwarnings('ignore', 'resource_tracker: process died')  # it is restarted
    multiprocessing.resource_tracker.ensure_running()  # first, since it unblocks signals
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STATUS)  # Ctrl-C must not stop the server while it imports
    try:
        multiprocessing.forkserver.ensure_running()
    except OSError as error:
        if 'AF_UNIX path' not in str(error):
            raise
        advice = 'is too long a path for a socket in it: set a shorter TMPDIR, or --nthread 0'
        raise ValueError(f'{tempfile.gettempdir()} {advice}') from None
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return forkserver


@contextlib.contextmanager
def _without_script():
    """Start a process that does not run this program's script once more, as multiprocessing would have it.

    Its imports would take seconds and 150 MB in each process, which needs no function of the script.
    """
    script, sys.modules['__main__'] = sys.modules['__main__'], types.ModuleType('__main__')
    try:
        yield
    finally:
        sys.modules['__main__'] = script


class Reader:
    """A process that fills slots of memory, one task after another, until it is closed."""

    def __init__(self):
        self.connection, theirs = context().Pipe()
        self.process = context().Process(target=_serve, args=(theirs,), daemon=True)
        self.slots, self.busy = None, True
        try:
            with _without_script():
                self.process.start()
        except (EOFError, ConnectionError):
            raise ChildProcessError('a process that reads images died as it was started') from None
        theirs.close()
        _running.append(self)

    def answers(self):
        """Whether the process is there; if the system has killed it, perhaps for lack of memory, it is closed."""
        try:
            self.connection.send(None)
            self.connection.recv()  # while a process is being killed, its exit status does not tell yet
            return True
        except (EOFError, ConnectionError):
            self.close()
            return False

    def begin(self, read, given, shape, count):
        """Announce `count` tasks, and share with the process what is given and the slots, uint8 arrays of `shape`."""
        file = memory(SLOTS * math.prod(shape))
        with contextlib.suppress(ConnectionError):  # `_receive` reports its death
            # Names may be relative to the current folder.
            self.connection.send((read, given.rest, given.sizes, shape, count, os.getcwd()))
            for shared in (given.file, file):
                send_handle(self.connection, shared, self.process.pid)
        self.slots = torch.from_numpy(_slots(file, shape))

    def close(self):
        """End the process, unless it is closed already; kill it if it does not end by itself."""
        if self not in _running:
            return
        _running.remove(self)
        self.connection.close()
        self.process.join(ENDING)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()


_running = []  # the `Reader`s of this process, for the next batches or the end of the program


@atexit.register  # registered after multiprocessing's own, so called before it, which would wait for idle processes
def _close_all():
    for reader in list(_running):
        reader.close()


@contextlib.contextmanager
def _reader():
    """A `Reader`, one that was left if there is any; it is left for the next use, unless this one ends early."""
    left = [reader for reader in _running if not reader.busy]
    reader = next((reader for reader in left if reader.answers()), None) or Reader()
    reader.busy = True
    try:
        yield reader
    except BaseException:
        reader.close()
        raise
    reader.slots, reader.busy = None, False


def read_ahead(read, given, tasks, shape, number):
    """Yield what read(value, task, out) returns for each task in order, computed by `number` processes some ahead.

    `given` is the value, as `Shared`. read fills the first rows of out, a uint8 array of `shape`, and returns them as a
    tensor, then values that can be pickled. The rows are valid until the next ones are requested. The processes are
    kept for the next call. Raises ChildProcessError if one dies.
    """
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(_reader()) for _ in range(min(number, len(tasks)))]
        for i, reader in enumerate(readers):
            reader.begin(read, given, shape, len(tasks[i :: len(readers)]))
        ahead = SLOTS * len(readers)
        for task, reader in zip(tasks[:ahead], itertools.cycle(readers)):
            _send(reader, task)
        for i, reader in zip(range(len(tasks)), itertools.cycle(readers)):
            count, *values = _receive(reader, readers)
            yield reader.slots[i // len(readers) % SLOTS, :count], *values
            if i + ahead < len(tasks):
                _send(reader, tasks[i + ahead])


def _send(reader, task):
    with contextlib.suppress(ConnectionError):  # `_receive` reports its death
        reader.connection.send(task)


def _receive(reader, readers):
    """A process's answer; raises ChildProcessError as soon as any process has died."""
    processes = {r.process.sentinel: r.process for r in readers}
    ended = [processes[ready] for ready in wait([reader.connection, *processes]) if ready in processes]
    try:
        answer = None if ended else reader.connection.recv()
    except (EOFError, ConnectionError):
        ended = [reader.process]
    if ended:
        ended[0].join(ENDING)
        status = ended[0].exitcode or 0
        how = f'signal {-status}' if status < 0 else f'exit status {status}'
        raise ChildProcessError(
            f'a process that reads images died ({how}); if the system killed it for lack of memory, '
            'lower --nthread or --batch_size'
        )
    if isinstance(answer, Exception):
        raise answer
    if isinstance(answer, str):
        raise RuntimeError(f'in a process that reads images: {answer}')
    return answer


def _slots(file, shape):
    """The memory in a file as an array (SLOTS, *shape); closes the file."""
    memory = mmap.mmap(file, SLOTS * math.prod(shape))
    os.close(file)
    return np.frombuffer(memory, np.uint8).reshape(SLOTS, *shape)


def _serve(connection):
    children.end_with_parent(os.getppid())
    torch.set_num_threads(1)
    for signum in STATUS:  # the training process decides when to stop
        signal.signal(signum, signal.SIG_IGN)
    with contextlib.suppress(EOFError, ConnectionError):  # the training process has ended, or needs no more
        while True:
            begun = connection.recv()
            if begun is None:  # see `Reader.answers`
                connection.send(None)
            else:
                _fill(connection, *begun)


def _fill(connection, read, rest, sizes, shape, count, folder):
    """Read `count` tasks after a `Reader.begin`."""
    os.chdir(folder)
    value = Shared(recv_handle(connection), rest, sizes).value
    slots = _slots(recv_handle(connection), shape)
    for i in range(count):
        task = connection.recv()
        try:
            rows, *values = read(value, task, slots[i % SLOTS])
            answer = len(rows), *values
        except Exception as error:
            answer = error if is_of_the_machine(error) else traceback.format_exc()
        connection.send(answer)
