"""HDF5 files of every hickle version are read, and hostile ones refused without harm."""

import pickle
import tracemalloc
import zlib

import h5py
import hickle
import numpy as np
import pytest
from saved import Touch, hickle_1, hickle_2, hickle_3, hickle_4, reason, small_export

from formats import networks


@pytest.mark.parametrize('layout', [hickle_1, hickle_2, hickle_3, hickle_4])
@pytest.mark.parametrize('dtype', ['f', '>f4', 'd', 'e'])
def test_historical_hickle_files_are_read(tmp_path, layout, dtype):
    arrays = {k: v.astype(dtype) for k, v in small_export().items()}
    with h5py.File(tmp_path / 'old.hkl', 'w') as file:
        layout(file, arrays)
    _, params = networks.load_teacher(tmp_path / 'old.hkl')
    assert set(params) == set(arrays)
    assert all(np.array_equal(params[k].numpy(), v.astype('f')) for k, v in arrays.items())


@pytest.fixture
def hkl(tmp_path):
    """Write an .hkl in the layout of hickle 5 and apply a function to its data: hkl(change) -> path."""

    def make(change):
        path = tmp_path / 'hostile.hkl'
        hickle.dump(small_export(), str(path), mode='w')
        with h5py.File(path, 'r+') as file:
            change(file['data'])
        return path

    return make


def test_links_in_hdf5_are_not_followed(hkl, tmp_path):
    with h5py.File(tmp_path / 'other.h5', 'w') as other:
        other['secret'] = np.ones(3, 'f')

    def put(link):
        def change(data):
            data['"x"'] = link

        return change

    for link in (h5py.SoftLink('/data/"fc.bias"'), h5py.SoftLink('/nowhere'), h5py.ExternalLink('other.h5', '/secret')):
        assert 'is not a hard link' in reason(hkl(put(link)))
    with h5py.File(tmp_path / 'root.hkl', 'w') as file:
        file['data'] = h5py.ExternalLink('other.h5', '/')
    assert 'is not a hard link' in reason(tmp_path / 'root.hkl')


def test_values_in_other_files_are_not_read(hkl, tmp_path):
    secret = tmp_path / 'secret'
    secret.write_bytes(bytes(12))
    layout = h5py.VirtualLayout((3,), 'f')
    layout[:] = h5py.VirtualSource(str(tmp_path / 'other.h5'), 'secret', (3,))
    external = hkl(lambda data: data.create_dataset('"x"', (3,), 'f', external=[(str(secret), 0, 12)]))
    assert "'x' keeps its values in other files" in reason(external)
    virtual = hkl(lambda data: data.create_virtual_dataset('"x"', layout))
    assert "'x' keeps its values in other files" in reason(virtual)


def test_hard_link_loops_and_nested_groups_end(hkl):
    def loop(data):
        data['"x"'] = data

    def inner_loop(data):
        data.create_group('"x"')['data'] = data

    def root(data):
        data['"x"'] = data.file['/']

    def alias(data):
        data['"x"'] = data['"fc.weight"']

    for change in (loop, inner_loop, root, alias):
        assert 'leads to an object for the second time' in reason(hkl(change))
    assert 'a group of something other' in reason(hkl(lambda data: data.create_group('"x"/data/data/data')))
    assert 'a group of something other' in reason(hkl(lambda data: data.create_group('"x"')))


def test_a_group_of_countless_objects_is_refused(hkl, monkeypatch):
    monkeypatch.setattr('formats.hdf5.MAX_NODES', 20)
    assert '74 objects in one group; at most 20' in reason(hkl(lambda data: None))


def test_huge_declared_shapes_are_refused_before_memory_is_taken(hkl):
    def declare(shape, **how):
        return lambda data: data.create_dataset('"x"', shape, 'f', **how)

    changes = [
        declare((2**16, 2**16)),  # 16 GiB, of which nothing is written
        declare((2**16, 2**16), chunks=(2**10, 2**10)),
        declare((2**16, 2**16), chunks=(2**10, 2**10), compression='gzip'),
        declare((2**20,)),  # 4 MiB from some kilobytes
        declare((2**63 - 1,), chunks=(1,)),
        declare((2**20,), chunks=(1,), compression='gzip'),
        declare((8,), chunks=(2**28,), maxshape=(None,)),
    ]
    for change in changes:
        path = hkl(change)
        tracemalloc.start()
        message = reason(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert "'x' declares" in message or "'x' is cut into" in message
        assert peak < 3e6


def test_arrays_that_together_exceed_the_budget_are_refused(hkl, monkeypatch):
    monkeypatch.setattr('formats.read.MAX_BYTES', 10_000)
    path = hkl(lambda data: None)
    assert 'it has' in reason(path) and 'at most 10,000 are read' in reason(path)
    monkeypatch.setattr('formats.read.MAX_BYTES', path.stat().st_size)
    zeros = hkl(lambda data: data.create_dataset('"x"', data=np.zeros(400_000, 'f'), compression='gzip'))
    monkeypatch.setattr('formats.read.MAX_BYTES', zeros.stat().st_size)
    assert 'and the arrays before it declare more than' in reason(zeros)


def test_a_chunk_that_unpacks_to_more_than_its_share_is_refused(hkl):
    def bomb(data):
        x = data.create_dataset('"x"', (64,), 'f', chunks=(64,), compression='gzip')
        x.id.write_direct_chunk((0,), zlib.compress(bytes(50_000_000)))

    assert 'a chunk that unpacks to more than its 256 bytes' in reason(hkl(bomb))


def test_other_filters_and_types_than_known_ones_are_refused(hkl):
    x = np.ones((4, 4), 'f')
    for how in ({'compression': 'lzf'}, {'scaleoffset': 2}, {'fletcher32': True}):
        assert 'has a filter other than gzip' in reason(hkl(lambda data: data.create_dataset('"x"', data=x, **how)))  # noqa: B023
    for array in (x.astype('i4'), x.astype(bool), x.astype('c8'), np.array([b'abc']), h5py.Empty('f')):
        assert 'not an array of floats' in reason(hkl(lambda data: data.create_dataset('"x"', data=array)))  # noqa: B023
    text = hkl(lambda data: data.create_dataset('"x"', data='text', dtype=h5py.string_dtype()))
    assert 'not an array of floats' in reason(text)


@pytest.mark.filterwarnings('ignore:.*not understood')
def test_what_hickle_pickled_is_not_unpickled(hkl, tmp_path, trace):
    path = str(tmp_path / 'pickled.hkl')
    hickle.dump({**small_export(), 'x': Touch(trace)}, path, mode='w')
    assert "'x' is uint8, not an array of floats; pickled objects are not read" in reason(path)
    hickle.dump(Touch(trace), path, mode='w')
    assert 'is not a dictionary of arrays' in reason(path)
    code = pickle.dumps(Touch(trace))
    with h5py.File(path, 'w') as file:  # hickle 3
        hickle_3(file, {**small_export(), 'x': np.array([code])})
    assert 'pickled objects are not read' in reason(path)
    with h5py.File(path, 'w') as file:  # hickle 4 pickles the types of arrays
        hickle_4(file, small_export())
        for group in file['data'].values():
            group['data'].attrs['type'] = np.void(code)
    networks.load_teacher(path)


def test_hdf5_that_holds_something_else_is_refused(tmp_path):
    path = tmp_path / 'other.h5'
    with h5py.File(path, 'w') as file:
        file['weights'] = np.ones(3)
    assert 'without the dictionary that hickle writes' in reason(path)
    with h5py.File(path, 'w') as file:
        file['data/a'], file["data/'a'"] = np.ones(3), np.ones(3)
    assert "'a' appears twice" in reason(path)
