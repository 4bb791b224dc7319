"""The dtypes of training: mixed precision, and parameters on their device."""

import contextlib

import torch

from utils import DTYPES, cast


def autocast(device, dtype):
    """The context for a dtype of `utils.DTYPES`: bfloat16 and float16 compute, parameters and losses stay float32."""
    dtype = DTYPES[dtype]
    if dtype in (torch.bfloat16, torch.float16):
        return torch.autocast(device.type, dtype)
    return contextlib.nullcontext()


def slow_in_16_bits(device):
    """Whether bfloat16 and float16 take several times as long as float32: on x86 CPUs without AVX-512.

    PyTorch has no convolutions in them there, and unfolds the images.
    """
    return device.type == 'cpu' and torch.backends.cpu.get_cpu_capability() == 'AVX2'


def place(params, dtype, device):
    """A network's parameters on the device: float64 for --dtype double, else float32; see `wants_channels_last`."""
    params = cast(params, 'double' if DTYPES[dtype] == torch.float64 else 'float', device)
    # contiguous(memory_format=...) would leave the strides of 1x1 weights as they are.
    return {k: v.clone(memory_format=torch.channels_last) if wants_channels_last(v) else v for k, v in params.items()}


def wants_channels_last(value):
    """Whether a parameter is a convolution's weight whose gradient is in channels-last order, so that it should be too.

    On CPUs only 1x1 weights are reordered, whose values stay in their places: with larger ones some convolutions would
    round differently. On GPUs none are in float64, which cuDNN computes in contiguous order.
    """
    if value.device.type == 'cpu':
        return value.shape[2:] == (1, 1)
    return value.dim() == 4 and value.dtype != torch.float64


def freeze(params, dtype, device):
    """A teacher's parameters on the device, cast once to the compute dtype except those of batch norm."""
    params = place(params, dtype, device)
    norms = {k.removesuffix('.running_mean') for k in params if k.endswith('.running_mean')}
    return {k: v if k.rpartition('.')[0] in norms else v.to(DTYPES[dtype]) for k, v in params.items()}
