"""How a script ends: one line for what went wrong, and an exit status (2 wrong use, 1 failed run)."""

import errno
import os
import signal
import sys

import torch

import children
from stopping import Stopped
from workers import LOST_PEER, TOLD, rank

OUT_OF_MEMORY = 'out of memory', "can't allocate memory"  # in what torch says on GPUs and on CPUs
DISK_ERRORS = errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO  # no fault of the command's
FAILURES = FloatingPointError, ChildProcessError  # of the run, not of its command


def run(main):
    """Call a script's main; what goes wrong becomes one line and an exit status (2 wrong use, 1 failed run).

    A run that a signal stopped says how to go on and exits with 143 (SIGTERM), 130 (SIGINT) or 0 (SIGUSR1).
    With AT_TRACEBACK=1 in the environment the traceback is shown instead.
    """
    children.import_safely()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, 'reconfigure'):
            stream.reconfigure(errors='backslashreplace')  # or a name that the terminal cannot show would end the run
    try:
        main()
    except Stopped as stop:
        if rank() == 0:
            print(f'{os.path.basename(sys.argv[0])}: {stop}', file=sys.stderr)
        sys.exit(stop.status)
    except KeyboardInterrupt:
        _tell(130, 'interrupted')
        sys.exit(130)
    except Exception as error:
        if isinstance(error, torch.distributed.DistError) or '/gloo/' in str(error):
            sys.exit(LOST_PEER)  # another worker has ended, and said why
        status, message = _verdict(error)
        if message is None or os.environ.get('AT_TRACEBACK'):
            _tell(status, '')
            raise
        _tell(status, message)
        sys.exit(status)
    finally:
        if torch.distributed.is_initialized():  # or a thread of its may crash the interpreter as that ends
            torch.distributed.destroy_process_group()


def _verdict(error):
    """The (exit status, message) of an error that the user can mend; (1, None) of a fault of the program."""
    if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
        return 1, f'out of memory ({error}); try a smaller --batch_size, --image_size or network'
    if isinstance(error, FAILURES) or getattr(error, 'errno', None) in DISK_ERRORS:
        return 1, str(error)
    return (2, str(error)) if isinstance(error, ValueError | OSError) else (1, None)


def _tell(status, message):
    """Print an error in one line; of several workers on a machine, the first that has one speaks for all.

    It leaves the exit status in a file for the launcher, which may see other workers end before this one.
    """
    if 'TORCHELASTIC_ERROR_FILE' in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher ends the others when it sees that one has ended
        attempt = os.path.dirname(os.path.dirname(os.environ['TORCHELASTIC_ERROR_FILE']))
        try:
            with open(os.path.join(attempt, TOLD), 'x', encoding='utf-8') as file:
                file.write(str(status))
        except FileExistsError:
            return
    line = ''.join(c if c.isprintable() else '?' for c in ' '.join(message.split()))  # it may quote a hostile file
    if line:
        print(f'{os.path.basename(sys.argv[0])}: error: {line}', file=sys.stderr, flush=True)
