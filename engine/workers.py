"""Workers, one process per GPU or several on CPUs: how they start, exchange tensors and print."""

import contextlib
import ctypes
import itertools
import os
import re
import socket
import sys
from datetime import timedelta
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

from engine import launch
from engine.arguments import GPU, printable
from images import children
from layers import STATISTICS, synchronise

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from glibc's malloc.h
PATIENCE = timedelta(minutes=30)  # that workers wait for one that lists images; nccl's default is 10


class Place(NamedTuple):
    """The position of a process among the workers of a run."""

    rank: int  # its number among all of them
    local: int | None  # its number on its machine; None if unknown
    world: int  # the number of workers


def place():
    """The place of this process, from the launcher's environment variables; a single worker if they are incomplete."""
    texts = [os.environ.get(name, '').strip() for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')]
    rank, local, world = (int(text) if text.isascii() and text.isdigit() else None for text in texts)
    if rank is None or world is None or not rank < world or world == 1:
        return Place(0, 0, 1)
    return Place(rank, local, world)


def rank():
    return place().rank


def world():
    return place().world


def say(*words):
    """Print, from the first worker only, words that may quote a hostile file."""
    if rank() == 0:
        print(*(printable(str(word)) for word in words), flush=True)


def launches(opt):
    """Whether this process only starts the workers and waits for them."""
    return opt.ngpu > 1 and world() == 1 and 'TORCHELASTIC_RUN_ID' not in os.environ


def check(opt):
    """Raise ValueError for a number of workers that does not fit the machine, the batch size or the launcher."""
    with _visible(opt.gpu_id) if launches(opt) else contextlib.nullcontext(_show(opt.gpu_id)):
        cuda = torch.cuda.is_available()
        available = torch.cuda.device_count() if cuda else os.cpu_count()
    if opt.ngpu > available:
        raise ValueError(f'--ngpu {opt.ngpu}: there are {available} {"GPUs" if cuda else "CPU cores and no GPU"}')
    if opt.cuda_graphs and (not cuda or max(opt.ngpu, world()) > 1):
        raise ValueError('--cuda_graphs: only for a single worker with a GPU')
    if opt.batch_size % max(opt.ngpu, world()):
        raise ValueError(f'--batch_size {opt.batch_size} is not a multiple of the {max(opt.ngpu, world())} workers')
    if opt.save and launch.opened():
        opt.overwrite = False  # a worker died, and all restart from the checkpoint
        opt.resume = 'auto' if os.path.exists(os.path.join(opt.save, 'model.pt7')) else opt.resume or 'auto'
    _check_launcher(available if cuda else 1)
    if opt.ngpu > 1 and world() == 1 and not launches(opt):
        raise ValueError(f'--ngpu {opt.ngpu}: torchrun (TORCHELASTIC_RUN_ID in the environment) has started one worker')
    _check_restarts()


def _check_launcher(gpus):
    """Raise ValueError if the environment sets several workers but not how they find each other."""
    number = os.environ.get('WORLD_SIZE', '').strip()
    if not number or number == '1':
        return  # RANK without WORLD_SIZE is left over from something else
    values = {name: os.environ.get(name, '').strip() for name in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT')}
    for name in ('RANK', 'WORLD_SIZE', 'MASTER_PORT'):
        if values[name] and not (values[name].isascii() and values[name].isdigit()):
            raise ValueError(f'{name}={values[name]} in the environment is not a number')
    missing = [name for name, value in values.items() if not value]
    if not missing and world() == 1:
        missing = [f'RANK below {number}']
    if not missing and place().local is None and gpus > 1:
        missing = [f'LOCAL_RANK to choose one of {gpus} GPUs']
    if missing:
        raise ValueError(
            f'WORLD_SIZE={number} is in the environment without {", ".join(missing)}: start several workers '
            'with torchrun --nnodes N --nproc-per-node GPUS --node-rank I --master-addr HOST, or unset WORLD_SIZE'
        )


def _show(gpu_id):
    """Make only the GPUs of --gpu_id visible to CUDA; change nothing if it is empty."""
    if gpu_id:
        os.environ['CUDA_VISIBLE_DEVICES'] = chosen_gpus(gpu_id, os.environ.get('CUDA_VISIBLE_DEVICES'))


@contextlib.contextmanager
def _visible(gpu_id):
    """`_show` within a block only: the launcher's workers read --gpu_id themselves."""
    before = os.environ.get('CUDA_VISIBLE_DEVICES')
    _show(gpu_id)
    try:
        yield
    finally:
        if gpu_id:
            os.environ.pop('CUDA_VISIBLE_DEVICES') if before is None else os.environ.update(CUDA_VISIBLE_DEVICES=before)


def chosen_gpus(gpu_id, visible):
    """The CUDA_VISIBLE_DEVICES for --gpu_id, given its present value `visible` (None: all): '1' of '2,3' is '3'.

    A GPU is named by its number among the visible ones, or by its identifier (GPU-..., MIG-...) or the beginning of
    that. Raises ValueError for one that is not visible.
    """
    if visible is None:
        return gpu_id
    names = (name.strip() for name in visible.split(','))
    allowed = list(itertools.takewhile(lambda name: re.fullmatch(GPU, name), names))  # as CUDA reads it
    chosen = []
    for gpu in gpu_id.split(','):
        if gpu.isdigit():
            named = allowed[int(gpu) : int(gpu) + 1]
        else:
            named = [name for name in allowed if name.startswith(gpu)]
        if len(named) != 1:
            raise ValueError(f'--gpu_id {gpu}: CUDA_VISIBLE_DEVICES={visible} allows {len(allowed)} GPUs, not this one')
        if named[0] in chosen:
            raise ValueError(f'--gpu_id {gpu_id} names a GPU twice')
        chosen += named
    return ','.join(chosen)


def join(opt):
    """Start the workers, join them and set the seed; return this worker's torch.device.

    With --ngpu N this command starts itself N times under PyTorch's elastic launcher and ends with them; the workers
    find their place in the environment, just as under torchrun.
    """
    cuda = torch.cuda.is_available()
    if 'TORCHELASTIC_RUN_ID' in os.environ or 'AT_PARENT' in os.environ:
        parent = int(os.environ.get('AT_PARENT') or children.PARENT)
        children.end_with_parent(parent, '' if rank() else 'the process that started this run has died, so it ends')
    launch.end_as_before()
    if world() > 1:
        _meet('nccl' if cuda else 'gloo')
    elif launches(opt):
        sys.exit(launch.launch(opt))
    device = torch.device('cuda', place().local or 0) if cuda else torch.device('cpu')
    if cuda:
        torch.cuda.set_device(device)
        choose_arithmetic(opt.deterministic)
    keep_memory()
    torch.manual_seed(opt.seed)
    return device


def choose_arithmetic(deterministic):
    """Fast arithmetic on GPUs, which may round differently in every run, or the same bits in every run.

    Where PyTorch has no deterministic algorithm, it then raises an error, which `ending.run` prints in one line.
    """
    torch.set_float32_matmul_precision('high')  # TensorFloat-32, the default for convolutions
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic
    if deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(deterministic)


def _meet(backend):
    """Join the other workers. Raises ValueError if their address is invalid or in use."""
    address, port = os.environ['MASTER_ADDR'], os.environ['MASTER_PORT']
    try:
        socket.getaddrinfo(address, int(port))
        dist.init_process_group(backend, rank=rank(), world_size=world(), timeout=PATIENCE)
    except (dist.DistError, OSError, OverflowError) as error:
        if 'TORCHELASTIC_RUN_ID' in os.environ and isinstance(error, dist.DistError):
            raise  # the launcher's address is right: another worker has ended
        reason = str(error).splitlines()[0]
        raise ValueError(
            f'cannot meet the other workers at MASTER_ADDR {address}, MASTER_PORT {port}: {reason}'
        ) from None


def keep_memory():
    """Make glibc, if it is the C library, keep the memory that tensors free for the next step.

    By default it returns large blocks to the kernel, which clears the pages before it hands them out again: thousands
    of page faults a step. The process then keeps its peak memory, as with PyTorch's allocator for GPUs.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL('libc.so.6')
        libc.mallopt(M_MMAP_MAX, 0)  # a high M_MMAP_THRESHOLD would do too, but older versions refuse it
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _check_restarts():
    """Raise ValueError for a launcher whose restarted workers would wait for the dead ones.

    Workers exchange addresses through a store of the launcher. By default PyTorch 2.14 keeps one store over restarts,
    in which new workers find the addresses of the old ones and wait for them until they time out.
    """
    restarts = int(os.environ.get('TORCHELASTIC_MAX_RESTARTS') or 0)
    if restarts and os.environ.get('TORCHELASTIC_USE_AGENT_STORE') == 'True':
        raise ValueError(
            f'torchrun --max-restarts {restarts}: its restarts only work with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in '
            'its environment and --standalone or --rdzv-backend c10d'
        )


def data_parallel(f, params, mode=True, sync_bn=False):
    """The network in a mode, x -> (logits, groups), with the first worker's parameters in all of them.

    mode is True (training) or False (batch norm has fixed statistics). With sync_bn, batch norm uses the statistics of
    all workers' batches together. Gradients are those of each worker until `average_gradients_`.
    """
    synchronise(sync_bn and world() > 1)
    if world() > 1:
        for value in params.values():
            dist.broadcast(value.detach(), 0)
    return partial(f, params=params, mode=mode)


def average_gradients_(params):
    """Replace the gradients of these parameters by their means over all workers.

    They are added in one piece, always in the same order. DistributedDataParallel adds in another order in its first
    step than later, so with three workers or more a resumed run would round differently.
    """
    gradients = [param.grad for param in params if param.grad is not None]
    if world() == 1 or not gradients:
        return
    means = torch.cat([gradient.flatten() for gradient in gradients]).div_(world())
    dist.all_reduce(means)
    for gradient, mean in zip(gradients, means.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(mean.view_as(gradient))


def sum_over_workers(values, device):
    """Each of a list of numbers, summed over all workers."""
    values = torch.tensor(values, dtype=torch.float64, device=device)
    if world() > 1:
        dist.all_reduce(values)
    return values.tolist()


def join_statistics_(params):
    """Replace the running statistics by their mean over all workers."""
    if world() > 1:
        for key, value in params.items():
            if key.endswith(STATISTICS):
                dist.all_reduce(value)
                value /= world()
