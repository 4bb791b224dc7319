"""One process a GPU, or several on CPUs: how they are started, what they tell each other, and who speaks."""

import contextlib
import ctypes
import glob
import logging
import os
import signal
import sys
import tempfile
import warnings
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

import children
from stopping import STATUS
from utils import STATISTICS

LOST_PEER = 3  # exit status of a worker that stops because another one has ended
TOLD = 'told'  # a file beside the launcher's logs: the exit status of the worker that has said what is wrong
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


class Place(NamedTuple):
    """Where a process stands among the workers of a run."""

    rank: int  # its number among all of them
    local: int | None  # its number among those of its machine; None where nobody has said
    world: int  # how many there are


def place():
    """The place of this process, from what a launcher has left in the environment; alone where that is not whole."""
    found = [os.environ.get(name, '').strip() for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')]
    rank, local, world = (int(text) if text.isascii() and text.isdigit() else None for text in found)
    if rank is None or world is None or not rank < world or world == 1:
        return Place(0, local or 0, 1)
    return Place(rank, local, world)


def rank():
    return place().rank


def world():
    return place().world


def say(*words):
    """Print, from the first worker alone."""
    if rank() == 0:
        print(*words, flush=True)


def launches(opt):
    """Whether this process only starts the workers and waits for them."""
    return opt.ngpu > 1 and world() == 1 and 'TORCHELASTIC_RUN_ID' not in os.environ


def check(opt):
    """Refuse numbers of workers that the machine, the batch size or the launcher cannot follow; ValueError says why."""
    with _visible(opt.gpu_id) if launches(opt) else contextlib.nullcontext(_show(opt.gpu_id)):
        cuda = torch.cuda.is_available()
        there = torch.cuda.device_count() if cuda else os.cpu_count()
    if opt.ngpu > there:
        raise ValueError(f'--ngpu {opt.ngpu}: there are {there} {"GPUs" if cuda else "CPU cores and no GPU"}')
    if opt.cuda_graphs and (not cuda or max(opt.ngpu, world()) > 1):
        raise ValueError('--cuda_graphs: only for a single worker with a GPU')
    if opt.batch_size % max(opt.ngpu, world()):
        raise ValueError(f'--batch_size {opt.batch_size} is not a multiple of the {max(opt.ngpu, world())} workers')
    if opt.save and int(os.environ.get('TORCHELASTIC_RESTART_COUNT') or 0):
        opt.resume, opt.overwrite = 'auto', False  # a worker died, and all begin again where the checkpoint is
    _check_launcher(there if cuda else 1)
    _check_restarts()


def _check_launcher(gpus):
    """Refuse an environment that speaks of several workers and does not say how they find each other."""
    number = os.environ.get('WORLD_SIZE', '').strip()
    if not number or number == '1':
        return  # a RANK alone is a leftover of something else
    here = {name: os.environ.get(name, '') for name in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')}
    wrong = [name for name, value in here.items() if not value.strip()]
    if not wrong and world() == 1:
        wrong = [f'RANK below {number}']
    if not wrong and place().local is None and gpus > 1:
        wrong = [f'LOCAL_RANK, which of the {gpus} GPUs is its own']
    if wrong:
        raise ValueError(
            f'WORLD_SIZE={number} in the environment, as of several workers, without {", ".join(wrong)}: start them '
            'with torchrun --nnodes N --nproc-per-node GPUS --node-rank I --master-addr HOST, or unset WORLD_SIZE'
        )


def _show(gpu_id):
    """Let CUDA see the GPUs of --gpu_id alone; all that it may see where that is empty."""
    if gpu_id:
        os.environ['CUDA_VISIBLE_DEVICES'] = chosen_gpus(gpu_id, os.environ.get('CUDA_VISIBLE_DEVICES'))


@contextlib.contextmanager
def _visible(gpu_id):
    """`_show` for a while: the launcher's workers read --gpu_id themselves."""
    before = os.environ.get('CUDA_VISIBLE_DEVICES')
    _show(gpu_id)
    try:
        yield
    finally:
        if gpu_id:
            os.environ.pop('CUDA_VISIBLE_DEVICES') if before is None else os.environ.update(CUDA_VISIBLE_DEVICES=before)


def chosen_gpus(gpu_id, visible):
    """What CUDA_VISIBLE_DEVICES has to be for --gpu_id, where it is `visible`, None for all: '1' of '2,3' is '3'.

    A GPU is named by its number among those that are visible, or by its identifier (GPU-..., MIG-...) or the beginning
    of that. ValueError names one that is not visible.
    """
    if visible is None:
        return gpu_id
    allowed, chosen = [name.strip() for name in visible.split(',') if name.strip()], []
    for gpu in gpu_id.split(','):
        if gpu.isdigit():
            named = allowed[int(gpu) : int(gpu) + 1]
        else:
            named = [name for name in allowed if name.startswith(gpu)]
        if len(named) != 1:
            raise ValueError(f'--gpu_id {gpu}: CUDA_VISIBLE_DEVICES={visible} allows {len(allowed)} GPUs, not this one')
        chosen += named
    return ','.join(chosen)


def join(opt):
    """Start the workers, join them and seed: returns the torch.device of this worker.

    With --ngpu N this command starts itself N times under PyTorch's elastic launcher and ends with them; the workers
    find their place in the environment, just as under torchrun.
    """
    cuda = torch.cuda.is_available()
    if 'TORCHELASTIC_RUN_ID' in os.environ or 'AT_END_WITH_PARENT' in os.environ:
        children.end_with_parent('' if rank() else 'what started this run has died, and it ends')
    if world() > 1:
        dist.init_process_group('nccl' if cuda else 'gloo', rank=rank(), world_size=world())
    elif launches(opt):
        sys.exit(_launch(opt))
    device = torch.device('cuda', place().local or 0) if cuda else torch.device('cpu')
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cudnn.deterministic = True  # a resumed run has to repeat every bit
        torch.set_float32_matmul_precision('high')  # TensorFloat-32, as convolutions have by default
    keep_memory()
    torch.manual_seed(opt.seed)
    return device


def keep_memory():
    """Have the C library keep what tensors free, for the next step, where that is glibc.

    By itself it gives large blocks back to the kernel, which clears the pages when it hands them out again: thousands
    of page faults a step. What a process holds is then its peak, as with PyTorch's allocator for GPUs.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL('libc.so.6')
        libc.mallopt(M_MMAP_MAX, 0)  # a high M_MMAP_THRESHOLD would do, but older versions refuse one
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _check_restarts():
    """Refuse a launcher whose restarted workers would look for the dead ones.

    Workers exchange addresses through a store of the launcher. PyTorch 2.14 keeps one store over restarts by default,
    where the new workers find the addresses of the old and wait for them until they time out.
    """
    restarts = int(os.environ.get('TORCHELASTIC_MAX_RESTARTS') or 0)
    if restarts and os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
        raise ValueError(
            f'torchrun --max-restarts {restarts}: its restarts work with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its '
            'environment and --standalone or --rdzv-backend c10d alone'
        )


def _launch(opt):
    """Run this very command once per worker, wait, and return the exit status."""
    from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if not torch.cuda.is_available():
        os.environ.setdefault('OMP_NUM_THREADS', str(max(1, os.cpu_count() // opt.ngpu)))
    os.environ['TORCH_DISABLE_SHARE_RDZV_TCP_STORE'] = '1'  # see _check_restarts
    logging.disable(logging.CRITICAL)  # one message is enough, and it is below
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
        except SignalException as stop:  # it was passed on to the workers, who have saved and said so
            return STATUS[stop.sigval]
        except ChildFailedError as error:
            return _explain(error.failures, folder, opt)
    return 0


def _explain(failures, folder, opt):
    """The exit status of workers that failed, {rank: ProcessFailure}; says why, unless one of them has.

    The folder is that of the launcher's logs: <run>/attempt_<number of the restart>/<rank>/.
    """
    attempt = max(glob.glob(os.path.join(folder, '*', 'attempt_*')), key=lambda path: int(path.rpartition('_')[2]))
    with contextlib.suppress(OSError, ValueError), open(os.path.join(attempt, TOLD), encoding='utf-8') as file:
        return int(file.read())
    by_others = LOST_PEER, -signal.SIGTERM  # ends of those that met the end of another, or that the launcher ended
    failed_rank, failure = min(failures.items(), key=lambda f: (f[1].exitcode in by_others, f[1].timestamp))
    how = f'signal {-failure.exitcode}' if failure.exitcode < 0 else f'exit status {failure.exitcode}'
    advice = '; go on with --resume auto' if opt.save else ''
    print(f'worker {failed_rank} died ({how}) and all were stopped{advice}', file=sys.stderr)
    return 1


class _Module(torch.nn.Module):
    """A functional network as the module that DistributedDataParallel wants."""

    def __init__(self, f, params, mode):
        super().__init__()
        self.f, self.params, self.mode = f, params, mode
        for key, value in params.items():
            if value.requires_grad:
                params[key] = torch.nn.Parameter(value.detach())
                self.register_parameter(key.replace('.', '/'), params[key])

    def forward(self, x):
        return self.f(x, self.params, self.mode)


def data_parallel(f, params, mode=True):
    """The network in a mode, x -> (logits, groups), with gradients averaged over workers if there are several.

    mode is True (training, each worker's batch statistics), 'sync' (those of all workers) or False (fixed statistics).
    With several workers, trained entries of `params` are replaced by torch.nn.Parameter: build the optimizer after.
    """
    if world() == 1:
        return partial(f, params=params, mode=bool(mode))
    warnings.filterwarnings('ignore', 'Grad strides do not match')  # 1x1 convolutions in channels-last order
    device = next(iter(params.values())).device
    ids = [device.index] if device.type == 'cuda' else None
    return torch.nn.parallel.DistributedDataParallel(_Module(f, params, mode), device_ids=ids)


def sum_over_workers(values, device):
    """The sums over all workers of a list of numbers."""
    values = torch.tensor(values, dtype=torch.float64, device=device)
    if world() > 1:
        dist.all_reduce(values)
    return values.tolist()


def join_statistics_(params):
    """Give all workers the mean of their running statistics."""
    if world() > 1:
        for key, value in params.items():
            if key.endswith(STATISTICS):
                dist.all_reduce(value)
                value /= world()
