"""A file of any kind is read whole or refused in one line."""

import errno
import json

import h5py
import hickle
import pytest
import safetensors.torch
import torch
from saved import hickle_2, reason, small_export, tensors

from formats import networks, read


def test_a_file_cut_short_anywhere_is_refused(tmp_path):
    arrays, path = small_export((2, 2, 2, 2)), tmp_path / 'cut'
    hickle.dump(arrays, str(tmp_path / 'hkl'), mode='w')
    with h5py.File(tmp_path / 'old', 'w') as file:
        hickle_2(file, arrays)
    torch.save(tensors(arrays), tmp_path / 'pth')
    torch.save(tensors(arrays), tmp_path / 'legacy', _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(tensors(arrays), tmp_path / 'safetensors')
    for kind in ('hkl', 'old', 'pth', 'legacy', 'safetensors'):
        content = (tmp_path / kind).read_bytes()
        for tenth in range(10):
            path.write_bytes(content[: len(content) * tenth // 10])
            assert 'is not a checkpoint' in reason(path)


def test_a_safetensors_header_that_lies_is_refused(tmp_path):
    path = tmp_path / 'lying.safetensors'

    def write(header, data=bytes(8), length=None):
        text = json.dumps(header).encode()
        path.write_bytes((len(text) if length is None else length).to_bytes(8, 'little') + text + data)

    def entry(shape=(2,), offsets=(0, 8), dtype='F32'):
        return {'dtype': dtype, 'shape': list(shape), 'data_offsets': list(offsets)}

    write({'x': entry()})
    assert torch.equal(read.read(path)['x'], torch.zeros(2))
    lies = [
        ({'x': entry(shape=(2**16, 2**16))}, {}),
        ({'x': entry(shape=(2**16, 2**16), offsets=(0, 2**34))}, {}),
        ({'x': entry(offsets=(0, 16), shape=(4,))}, {}),
        ({'x': entry(offsets=(-8, 0))}, {}),
        ({'x': entry(shape=(2**62, 4))}, {}),
        ({'x': entry(), 'y': entry()}, {}),
        ({'x': entry(dtype='pickle')}, {}),
        ({'x': entry()}, {'length': 2**63}),
        ({'x': entry()}, {'length': 10**6}),
        ({'x': entry()}, {'data': bytes(100)}),
        ([1], {}),
    ]
    for header, how in lies:
        write(header, **how)
        assert 'is not a checkpoint' in reason(path)


@pytest.mark.parametrize('fault', [MemoryError(), OSError(errno.EIO, 'it fails'), OSError(errno.EMFILE, 'it fails')])
@pytest.mark.parametrize('hidden', [False, True])
def test_a_failure_of_the_machine_does_not_make_a_file_a_damaged_one(tmp_path, monkeypatch, fault, hidden):
    def fails(path):
        try:
            raise fault
        except type(fault):
            if hidden:
                raise ValueError('I/O operation on closed file') from None
            raise

    monkeypatch.setattr(read, 'read_torch', fails)
    (tmp_path / 'file').write_bytes(b'PK')
    with pytest.raises(type(fault), match='file could not be read') as caught:
        read.read(tmp_path / 'file')
    assert getattr(caught.value, 'errno', None) == getattr(fault, 'errno', None)


@pytest.mark.parametrize('content', [b'', b'{}', b'PK\x03\x04', b'\x89HDF\r\n\x1a\n', b'<html>404</html>', b'\0' * 99])
def test_what_is_no_network_at_all_is_refused(tmp_path, content):
    path = tmp_path / 'file'
    path.write_bytes(content)
    assert 'is not a checkpoint' in reason(path)
    with pytest.raises(OSError, match='no such checkpoint'):
        networks.load_teacher(tmp_path)


@pytest.mark.parametrize('state', [3, [torch.ones(1)], {'a\nb': torch.ones(1)}, {3: torch.ones(1)}, {'a': 1}])
def test_a_torch_file_without_named_tensors_is_refused(tmp_path, state):
    torch.save(state, tmp_path / 'file')
    assert 'is not a checkpoint' in reason(tmp_path / 'file')
