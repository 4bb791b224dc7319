"""The cost of a step: seconds, memory and floating-point operations."""

import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.precision import slow_in_16_bits


def device():
    return torch.device('cuda' if torch.cuda.is_available() else 'cpu')


def fast_dtype():
    """The dtype that is fastest here, as --dtype: bfloat16, or float on x86 CPUs without AVX-512."""
    return 'float' if slow_in_16_bits(device()) else 'bfloat16'


def seconds(step, *batch):
    """Seconds that a step on a batch takes, including its work on a GPU."""
    start = time.perf_counter()
    step(*batch)
    if batch[0].device.type == 'cuda':
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matrix_rate(dtype, device, n=2048):
    """FLOP/s of a product of two n x n matrices: the best of 10."""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / min(seconds(torch.mm, a, b) for _ in range(10))


def peak_memory(step, *batch):
    """The peak memory of a step: bytes beyond those allocated before it."""
    device = batch[0].device
    if device.type == 'cuda':
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(*batch)
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step(*batch)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == '[memory]']
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def flops(step, *batch):
    """Floating-point operations of a step on a batch."""
    with FlopCounterMode(display=False) as counter:
        step(*batch)
    return counter.get_total_flops()


def settled_seconds(step, *batch, steps=2):
    """The mean `seconds` of consecutive steps, after threads and caches have settled from the other step."""
    time.sleep(0.02)
    step(*batch)
    return sum(seconds(step, *batch) for _ in range(steps)) / steps
