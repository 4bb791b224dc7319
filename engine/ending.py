"""How a script ends: an error as one line, and an exit status (2 wrong use, 1 failed run)."""

import atexit
import contextlib
import os
import signal
import sys
import traceback

import torch

from engine.arguments import printable
from engine.launch import LOST_PEER, claim
from engine.stopping import Stopped
from engine.workers import rank, world
from formats.faults import is_of_the_machine
from images import children

OUT_OF_MEMORY = 'out of memory', "can't allocate memory"  # in PyTorch's messages on GPUs and on CPUs
OF_THE_RUN = FloatingPointError, ChildProcessError, BrokenPipeError  # not the fault of the command


def run(main):
    """Call a script's main; print an error as one line and exit with its status (2 wrong use, 1 failed run).

    A run that a signal stopped prints how to continue and exits with 143 (SIGTERM), 130 (SIGINT) or 0 (SIGUSR1).
    With AT_TRACEBACK=1 in the environment the traceback is printed instead.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')  # else a name that the terminal cannot show would end the run
    try:
        _call(main)
    except BaseException as error:
        if not torch.distributed.is_initialized():
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        leave(error.code or 0 if isinstance(error, SystemExit) else 1)
    if torch.distributed.is_initialized():
        leave(0)


def with_its_reader():
    """Let the process end quietly when nobody reads what it prints any more, as in `| head`; not for training."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


def leave(status):
    """End a worker that has joined others, without the interpreter's own end: threads of gloo can crash it there."""
    # With nccl this waits until all workers do so, and they may wait for one that has failed. With gloo it waits until
    # all have joined; a worker that could not join would print a page.
    if status == 0 or torch.distributed.get_backend() != 'nccl':
        with contextlib.suppress(RuntimeError):  # of a connection that another worker has closed
            torch.distributed.destroy_process_group()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(status)


def _call(main):
    try:
        children.import_safely()
        main()
    except Stopped as stop:
        claim(stop.status, final=True)
        if rank() == 0:
            print_line(str(stop))
        sys.exit(stop.status)
    except KeyboardInterrupt:
        _print_error(130, 'interrupted', final=True)
        sys.exit(130)
    except Exception as error:
        if _is_lost_peer(error):
            sys.exit(LOST_PEER)  # another worker has ended and printed why
        status, message = _status_and_message(error)
        # A wrong command and a loss that is not finite fail again after a restart.
        final = status == 2 or isinstance(error, FloatingPointError)
        if message is None or os.environ.get('AT_TRACEBACK'):
            claim(status, final)
            raise
        _print_error(status, message, final)
        sys.exit(status)


def _is_lost_peer(error):
    """Whether an error means that another worker has ended."""
    lost = isinstance(error, torch.distributed.DistError)
    return world() > 1 and (lost or isinstance(error, RuntimeError) and '/gloo/' in str(error))


def _status_and_message(error):
    """The (exit status, message) of an error that the user can fix; (1, None) for a bug."""
    message = str(error) or type(error).__name__
    if isinstance(error, MemoryError) or any(words in message for words in OUT_OF_MEMORY):
        return 1, f'out of memory ({message}); try a smaller --batch_size, --image_size or network'
    if 'does not have a deterministic implementation' in message:
        return 2, f'--deterministic: {message.splitlines()[0]}'
    if isinstance(error, OF_THE_RUN) or is_of_the_machine(error):
        return 1, message
    return (2, message) if isinstance(error, ValueError | OSError) else (1, None)


def _print_error(status, message, final):
    """Print an error; of several workers on a machine, only the first to fail prints."""
    if claim(status, final):
        print_line(f'error: {message}')


def print_line(message):
    """Print a message as one line on stderr, after the script's name."""
    print(f'{os.path.basename(sys.argv[0])}: {printable(" ".join(message.split()))}', file=sys.stderr, flush=True)
