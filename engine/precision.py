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


def place(params, dtype, device):
    """A network's parameters on the device: float64 for --dtype double, else float32."""
    return cast(params, 'double' if DTYPES[dtype] == torch.float64 else 'float', device)


def freeze(params, dtype, device):
    """A teacher's parameters on the device, cast once to the compute dtype except those of batch norm."""
    params = place(params, dtype, device)
    norms = {k.removesuffix('.running_mean') for k in params if k.endswith('.running_mean')}
    return {k: v if k.rpartition('.')[0] in norms else v.to(DTYPES[dtype]) for k, v in params.items()}
