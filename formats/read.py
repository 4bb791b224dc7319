"""Read torch, safetensors and HDF5 files, recognised by their content, as data and never as code.

Nothing in a file runs, opens another file, or takes more memory than `MAX_BYTES` and the file's own size allow.
"""

import os
import warnings
from functools import partial

import safetensors.torch

from formats.faults import behind, told
from formats.hdf5 import read_hdf5
from formats.pickles import read_torch

MAX_BYTES = 4 * 2**30  # of a file, and of all arrays in it


def check_regular(path):
    """Raise OSError for a folder, device or pipe: reading one may never end, and a file must not replace one."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError(f'{path} is a folder, device or pipe, not a file')


def read(path):
    """The content of a torch, safetensors or HDF5 file, recognised by its first bytes; usually a dictionary of tensors.

    Raises OSError if there is no such file, and ValueError if it is none of these, damaged or hostile.
    """
    if not os.path.isfile(path):
        raise OSError(f'{path}: no such checkpoint')
    size = os.path.getsize(path)
    if size > MAX_BYTES:
        raise ValueError(f'{path} is not a checkpoint: it has {size:,} bytes, and at most {MAX_BYTES:,} are read')
    with open(path, 'rb') as file:
        start = file.read(9)
    if start.startswith(b'\x89HDF\r\n\x1a\n'):
        reader = partial(read_hdf5, max_bytes=MAX_BYTES)
    else:  # a safetensors file is the length of its JSON header in 8 bytes, then the header
        reader = read_safetensors if start[8:] == b'{' else read_torch
    try:
        with warnings.catch_warnings():  # about unusual pickles; what matters becomes an error
            warnings.simplefilter('ignore')
            return reader(path)
    except Exception as error:  # a damaged or hostile file can make a reader raise anything
        check_machine(error, path)
        advice = ''.join(f': {note}' for note in getattr(error, '__notes__', ()))
        damaged = ' of tensors alone' if advice else ', or is damaged'
        raise ValueError(f'{path} is not a checkpoint{damaged} ({first_line(error)}){advice}') from None


def check_machine(error, path):
    """Raise the failure of the machine that an error of reading a file is or hides, if there is one."""
    fault = behind(error)
    if isinstance(fault, MemoryError):
        raise MemoryError(f'{path} could not be read') from None
    if fault:
        raise told(f'{path} could not be read: {fault.strerror}', fault) from None


def first_line(error):
    """The first sentence of an error, in at most 200 printable characters."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0].split('. ')[0]
    return ''.join(c for c in line if c.isprintable())[:200]


def read_safetensors(path):
    """The tensors of a safetensors file: {name: tensor}."""
    with open(path, 'rb') as file:
        return safetensors.torch.load(file.read())
