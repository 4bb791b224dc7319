"""How `--ngpu N` starts this command N times, and the files that workers leave for their launcher and for a restart.

A launcher, ours or torchrun, gives each start of the workers a folder: attempt_0, attempt_1 and so on.
"""

import contextlib
import glob
import logging
import os
import signal
import sys
import tempfile

import torch

from engine.stopping import STATUS

LOST_PEER = 3  # exit status of a worker that stops because another one has ended
VERDICT = 'verdict'  # a file in the folder of a start: the exit status, and whether a restart would end likewise
OPENED = 'opened'  # a file beside these folders: --save holds this run, not an older one


def attempt():
    """The folder of this start of the workers, or None without a launcher."""
    file = os.environ.get('TORCHELASTIC_ERROR_FILE')
    return os.path.dirname(os.path.dirname(file)) if file else None


def claim(status, final):
    """Whether this worker is the first on its machine to end by itself, or the only one, and so prints for all.

    It writes its exit status for the launcher, which may see other workers end before this one, and `final` for
    restarts.
    """
    if not attempt():
        return True
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher terminates the others once one has ended
    try:
        with open(os.path.join(attempt(), VERDICT), 'x', encoding='utf-8') as file:
            file.write(f'{status} {int(final)}')
    except FileExistsError:
        return False
    except OSError:
        pass  # the error itself is more important
    return True


def verdict(folder):
    """The (exit status, final) that a worker wrote into the folder of a start; None if none did."""
    with contextlib.suppress(OSError, ValueError), open(os.path.join(folder, VERDICT), encoding='utf-8') as file:
        status, final = map(int, file.read().split())
        return status, bool(final)


def end_as_before():
    """End a restarted worker if the reason that ended the workers before would end them again."""
    if attempt():
        base, _, number = attempt().rpartition('_')
        previous = verdict(f'{base}_{int(number) - 1}') if number.isdigit() else None
        if previous and previous[1]:
            claim(*previous)
            sys.exit(previous[0])


def note_opened():
    """Record that --save now holds this run, so that a restart continues it."""
    if attempt():
        with contextlib.suppress(OSError), open(os.path.join(os.path.dirname(attempt()), OPENED), 'wb'):
            pass


def opened():
    """Whether an earlier start of the workers has opened this run."""
    return bool(attempt()) and os.path.exists(os.path.join(os.path.dirname(attempt()), OPENED))


def launch(opt):
    """Run this command once per worker under PyTorch's elastic launcher, wait, and return the exit status."""
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if not torch.cuda.is_available():
        os.environ.setdefault('OMP_NUM_THREADS', str(max(1, os.cpu_count() // opt.ngpu)))
    os.environ.setdefault('TORCH_CPP_LOG_LEVEL', 'ERROR')  # when a worker ends, the others would warn by pages
    os.environ.setdefault('TORCH_ELASTIC_SHUTDOWN_TIMEOUT', '3600')  # seconds to save after a signal, in place of 30
    os.environ['TORCH_DISABLE_SHARE_RDZV_TCP_STORE'] = '1'  # see workers._check_restarts
    os.environ['AT_PARENT'] = str(os.getpid())
    logging.disable(logging.CRITICAL)  # one message is enough: the one below
    with tempfile.TemporaryDirectory(prefix='attention-transfer-') as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=opt.ngpu,
            run_id=str(os.getpid()),
            rdzv_backend='c10d',
            rdzv_endpoint='localhost:0',
            max_restarts=opt.max_restarts,
            monitor_interval=1,
            signals_to_handle=','.join(s.name for s in STATUS),
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        try:
            elastic_launch(config, sys.executable)('-u', *sys.argv)
        except SignalException as stop:  # the workers got it too, and have saved and said so
            return STATUS[stop.sigval]
        except ChildFailedError as error:
            return _explain(error.failures, folder, opt)
    return 0


def _explain(failures, folder, opt):
    """The exit status for failed workers {rank: ProcessFailure}; prints the reason unless a worker has."""
    starts = glob.glob(os.path.join(folder, '*', 'attempt_*'))
    written = verdict(max(starts, key=lambda path: int(path.rpartition('_')[2])))
    if written:
        return written[0]
    by_others = LOST_PEER, -signal.SIGTERM  # stopped because another one ended, or by the launcher
    failed_rank, failure = min(failures.items(), key=lambda f: (f[1].exitcode in by_others, f[1].timestamp))
    how = f'signal {-failure.exitcode}' if failure.exitcode < 0 else f'exit status {failure.exitcode}'
    advice = '; go on with --resume auto' if opt.save else ''
    print(f'worker {failed_rank} died ({how}) and all were stopped{advice}', file=sys.stderr)
    return 1
