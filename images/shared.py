"""A value that several processes share: its arrays lie in one unnamed file in memory, which each of them maps.

A list of a million names would be copied into each process, even into a forked one: every use of a Python object counts
its references, in its own memory.
"""

import mmap
import os
import pickle
import tempfile
import weakref
from collections.abc import Sequence

import numpy as np

ALIGNMENT = 64  # bytes


class Names(Sequence):
    """File names as two arrays: read as a list of str."""

    def __init__(self, names):
        names = [os.fsencode(name) for name in names]
        self.text = np.frombuffer(b''.join(names), np.uint8)
        self.ends = np.cumsum([0, *map(len, names)])  # (N + 1,) int64

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        i = range(len(self))[i]  # from 0; raises IndexError
        return os.fsdecode(self.text[self.ends[i] : self.ends[i + 1]].tobytes())


class Shared:
    """`value`, with arrays that cannot be written, and `file`, the number of the open file that holds them."""

    def __init__(self, file, rest, sizes):
        """Map a file: `rest` is the value without its arrays, pickled, and `sizes` are theirs in bytes."""
        self.file, self.rest, self.sizes = file, rest, sizes
        weakref.finalize(self, os.close, file)
        memory = memoryview(mmap.mmap(file, 0, access=mmap.ACCESS_READ))
        self.value = pickle.loads(rest, buffers=[memory[part] for part in _parts(sizes)])

    def address(self):
        """What `at` needs in another process of this machine and user, while this object is there."""
        return f'/proc/{os.getpid()}/fd/{self.file}', self.rest, self.sizes

    @classmethod
    def at(cls, address):
        """The `Shared` of an `address`; raises OSError if it cannot be opened."""
        path, *more = address
        return cls(os.open(path, os.O_RDONLY), *more)


def share(value):
    """A value as `Shared`; its numpy arrays are copied once."""
    buffers = []
    rest = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    arrays = [buffer.raw() for buffer in buffers]
    sizes = [array.nbytes for array in arrays]
    parts = _parts(sizes)
    file = memory(max([1, *(part.stop for part in parts)]))
    with mmap.mmap(file, 0) as content:
        for part, array in zip(parts, arrays):
            content[part] = array
    return Shared(file, rest, sizes)


def memory(size):
    """An unnamed file of `size` bytes that processes can map; outside /dev/shm, of which containers have little."""
    if hasattr(os, 'memfd_create'):
        file = os.memfd_create('images')
    else:
        with tempfile.TemporaryFile() as named:
            file = os.dup(named.fileno())
    os.truncate(file, size)
    return file


def _parts(sizes):
    """Where arrays of these sizes lie in a file, each aligned: a list of slices."""
    steps = [-(-size // ALIGNMENT) * ALIGNMENT for size in sizes]
    starts = np.cumsum([0, *steps]).tolist()
    return [slice(start, start + size) for start, size in zip(starts, sizes)]
