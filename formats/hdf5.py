"""Read HDF5 files that hickle wrote, as data: hickle itself would run code in them."""

import math
import os
import re
import zlib

import h5py
import numpy as np
import torch

MAX_NODES = 10_000  # in one group of an HDF5 file; a ResNet-152 has fewer than 1,000 arrays
MAX_CHUNKS = 100_000  # of one HDF5 dataset
DEFLATE_RATIO = 1032  # a byte of a deflate stream unpacks to at most so many (zlib.net/zlib_tech.html)


def read_hdf5(path, max_bytes):
    """The dictionary of float arrays that hickle 1 to 5 wrote: {name: tensor}. hickle itself would run code in it.

    The dictionary is a group `data` (hickle 1, 4, 5) or `data_0` (2, 3). It holds each array under its key, which
    hickle 3 to 5 put in quotes: as a dataset (1, 5), or alone in a group and named like the outer group (2, 3, 4).
    Raises ValueError for anything else: links other than hard links, an object reached twice, values in other files,
    other dtypes, filters other than gzip (HDF5 loads the rest as plug-ins), arrays of more than `max_bytes` in total.
    """
    size = os.path.getsize(path)
    with h5py.File(path, 'r', locking=False) as file:
        seen = {_address(file)}
        root = next((name for name in ('data', 'data_0') if name in _names(file)), None)
        if root is None:
            raise ValueError('an HDF5 file without the dictionary that hickle writes')
        arrays, remaining = {}, max_bytes
        for key, dataset in _dictionary(_follow(file, root, seen), seen):
            if key in arrays:
                raise ValueError(f'{key!r} appears twice')
            remaining -= _declared_bytes(key, dataset, size)
            if remaining < 0:
                raise ValueError(f'{key!r} and the arrays before it declare more than {max_bytes:,} bytes')
            arrays[key] = dataset
        return {key: _read_dataset(key, dataset, size) for key, dataset in arrays.items()}


def _address(node):
    return h5py.h5o.get_info(node.id).addr


def _names(group):
    if len(group) > MAX_NODES:
        raise ValueError(f'{len(group):,} objects in one group; at most {MAX_NODES:,} are read')
    return list(group)


def _follow(group, name, seen):
    """The dataset or group under a name, which must be a hard link to an object that was not reached before."""
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f'{name!r} is not a hard link')
    node = group[name]
    if _address(node) in seen:
        raise ValueError(f'{name!r} leads to an object for the second time: two names or a loop of hard links')
    seen.add(_address(node))
    if not isinstance(node, h5py.Group | h5py.Dataset):
        raise ValueError(f'{name!r} is not an array')
    return node


def _dictionary(group, seen):
    """Yield the (key, dataset) pairs of the group that holds a dictionary."""
    if not isinstance(group, h5py.Group):
        raise ValueError(f'{group.name} is not a dictionary of arrays')
    names = _names(group)
    members = set(names)
    for name in names:
        if name.startswith('_') and name[1:] in members:
            continue  # hickle 1 stores the type's name there
        node = _follow(group, name, seen)
        if isinstance(node, h5py.Group):
            inner = _names(node)
            node = _follow(node, inner[0], seen) if inner in (['data'], ['data_0']) else None
        if not isinstance(node, h5py.Dataset):
            raise ValueError(f'{name!r} is a group of something other than one array')
        quoted = re.fullmatch(r"""u?(['"])(.*)\1""", name)  # u: hickle 3 on Python 2
        yield quoted[2] if quoted else name, node


def _filters(dataset):
    plist = dataset.id.get_create_plist()
    return [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]


def _declared_bytes(key, dataset, file_size):
    """The bytes of an array, without allocating any; raises ValueError if the array must not be read."""
    plist = dataset.id.get_create_plist()
    if plist.get_layout() == h5py.h5d.VIRTUAL or plist.get_external_count():
        raise ValueError(f'{key!r} keeps its values in other files')
    shuffle, deflate = h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE
    filters = _filters(dataset)
    if filters not in ([], [shuffle], [deflate], [shuffle, deflate]):
        raise ValueError(f'{key!r} has a filter other than gzip')
    dtype, shape = dataset.dtype, dataset.shape
    if dtype.kind != 'f' or dtype.itemsize not in (2, 4, 8) or shape is None:
        raise ValueError(f'{key!r} is {dtype}, not an array of floats; pickled objects are not read')
    declared = math.prod(shape) * dtype.itemsize
    if declared > file_size * (DEFLATE_RATIO if deflate in filters else 1):
        raise ValueError(f'{key!r} declares {declared:,} bytes, more than a file of {file_size:,} can hold')
    if dataset.chunks:
        chunks = math.prod(-(-length // chunk) for length, chunk in zip(shape, dataset.chunks))
        if chunks > MAX_CHUNKS or math.prod(dataset.chunks) * dtype.itemsize > max(declared, 2**20):
            raise ValueError(f'{key!r} is cut into {chunks:,} chunks of shape {dataset.chunks}')
    return declared


def _read_dataset(key, dataset, file_size):
    _check_deflated_chunks(key, dataset, file_size)
    array = np.empty(dataset.shape, dataset.dtype.newbyteorder('='))
    if array.size:
        dataset.read_direct(array)
    return torch.from_numpy(array)


def _check_deflated_chunks(key, dataset, file_size):
    """Refuse a chunk that unpacks to more than its share of the array: HDF5 would unpack all of it into memory."""
    filters, chunks = _filters(dataset), []
    if h5py.h5z.FILTER_DEFLATE not in filters:
        return
    limit = math.prod(dataset.chunks) * dataset.dtype.itemsize
    dataset.id.chunk_iter(chunks.append)
    for chunk in chunks:
        if chunk.size > file_size:
            raise ValueError(f'{key!r} has a chunk that is longer than the file')
        skipped, content = dataset.id.read_direct_chunk(chunk.chunk_offset)
        if skipped >> len(filters) - 1 & 1:
            continue  # stored uncompressed, since compression did not make it shorter
        if len(zlib.decompressobj().decompress(content, limit + 1)) > limit:
            raise ValueError(f'{key!r} has a chunk that unpacks to more than its {limit:,} bytes')
