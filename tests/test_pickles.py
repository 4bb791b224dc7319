"""Torch files run no code, take little memory and time, and errors about them give advice."""

import argparse
import itertools
import pickle
import re
import shlex
import struct
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest
import torch
from conftest import refused
from saved import Touch, reason, small_export, tensors

import checkpoint
from formats import networks, read


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('protocol', [3, 4, 5])
def test_newer_pickles_are_read_as_the_usual_ones(tmp_path, zipped, protocol):
    arrays = tensors(small_export())
    more = {'note': 'conv0.weight', 'list': ['storage', 'cpu', 2.5, None, True, (1, 2, 3, 4)], 'long': 'x' * 70_000}
    state = {'net': {k: torch.nn.Parameter(v) for k, v in arrays.items()}, **more, 'dtype': torch.float16}
    torch.save(state, tmp_path / 'a', pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    found = read.read(tmp_path / 'a')
    assert {k: v for k, v in found.items() if k in more} == more and found['dtype'] == torch.float16
    _, params = networks.load_teacher(tmp_path / 'a')
    assert all(torch.equal(params[k], v) for k, v in arrays.items())


@pytest.mark.parametrize('zipped', [True, False])
def test_a_whole_network_is_refused_with_what_to_save_instead(tmp_path, zipped, torchvision_net):
    for state in (torchvision_net[0], {'model': torch.nn.Sequential(torch.nn.Linear(2, 2))}):
        for protocol in (2, 4):
            torch.save(state, tmp_path / 'a', pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
            assert 'torch.save(model.state_dict(), "weights.pth")' in reason(tmp_path / 'a')


@pytest.mark.parametrize('name', ['a.pth', 'it\'s $(touch trace) `touch trace`; touch trace \\ "; touch trace; #.pth'])
@pytest.mark.parametrize('key', ['state_dict', 'model', 'net', 'params'])
@pytest.mark.parametrize('protocol', [2, 4])
def test_a_command_takes_the_weights_out_of_what_a_training_script_saved(script, tmp_path, trace, name, key, protocol):
    """File names are quoted for the shell, and only the command runs code in the file."""
    arrays, path = tensors(small_export()), tmp_path / name
    statistics = {'unused.running_mean': torch.ones(1)} if key == 'params' else {}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], 0.1)
    state = {
        'args': argparse.Namespace(model='resnet34', net=0.1),
        'best': np.float64(93),
        'x': np.ones(2),
        key: arrays,
    }
    torch.save({**state, 'optimizer': optimizer, 'stats': statistics}, path, pickle_protocol=protocol)
    status, out, err = script(checkpoint, 'info', [path])
    assert refused((status, out, err), "'argparse Namespace' in it is neither a tensor", 'if you trust it')
    command = re.search('python -c .*', err)[0]
    assert shlex.split(command)[:2] == ['python', '-c'] and not (tmp_path / 'weights.pth').exists()
    if key == 'params':
        subprocess.run(command.replace('python', sys.executable, 1), shell=True, check=True)
    else:  # the same in this process, which has imported torch: the shell prints the words that it would pass
        printed = subprocess.check_output(command.replace('python', r"printf '%s\0'", 1), shell=True, text=True)
        flag, code = printed.split('\0')[:-1]
        assert flag == '-c'
        exec(code, {})
    params = networks.load_params(tmp_path / 'weights.pth')
    assert params.keys() == arrays.keys() | statistics.keys()
    assert all(torch.equal(params[k], v) for k, v in arrays.items())


def test_a_file_of_other_things_gets_no_such_command(tmp_path, trace):
    arrays = tensors(small_export())
    for state in ({'state_dict': arrays, 'x': np.float64(3), 'y': Touch(trace)}, {'model': arrays, 'y': Touch(trace)}):
        torch.save(state, tmp_path / 'a')
        assert 'python' not in reason(tmp_path / 'a')
    torch.save({'weights': arrays, 'x': np.float64(3)}, tmp_path / 'a')
    assert reason(tmp_path / 'a').endswith('save the parameters alone: torch.save(model.state_dict(), "weights.pth")')


def test_code_in_a_torch_file_is_not_run(tmp_path, trace):
    path = tmp_path / 'model.pth'
    for state in ({'conv0.weight': Touch(trace)}, {'state_dict': Touch(trace)}, Touch(trace)):
        for zipped, protocol in itertools.product((True, False), (2, 4, 5)):
            torch.save(state, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
            assert "open' in it is neither a tensor" in reason(path)
        path.write_bytes(pickle.dumps(state))
        assert 'is not a checkpoint' in reason(path)


def test_tensors_larger_than_their_file_are_refused(tmp_path):
    state = {**tensors(small_export()), 'conv0.weight': torch.ones(1).expand(10**5, 10**5, 7, 7)}
    torch.save(state, tmp_path / 'stride')
    assert "'conv0.weight' in it is not a named tensor" in reason(tmp_path / 'stride')
    torch.save({'conv0.weight': torch.ones(10**5, 10**5, device='meta')}, tmp_path / 'meta')
    assert '_rebuild_meta_tensor_no_storage' in reason(tmp_path / 'meta')
    torch.save({'conv0.weight': torch.ones(2, 2).to_sparse()}, tmp_path / 'sparse')
    assert 'is not a checkpoint' in reason(tmp_path / 'sparse')


def test_a_zip_bomb_is_refused(tmp_path):
    torch.save({'conv0.weight': torch.zeros(5_000_000)}, tmp_path / 'plain')
    with zipfile.ZipFile(tmp_path / 'plain') as plain, zipfile.ZipFile(tmp_path / 'bomb', 'w', 8) as bomb:
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    assert torch.load(tmp_path / 'bomb', weights_only=True)  # torch would unpack it
    assert 'a zip archive that unpacks to 20,' in reason(tmp_path / 'bomb')
    with open(tmp_path / 'bomb', 'ab') as bomb:
        bomb.write(b'PK\5\6')  # zipfile takes it for the end of an archive and finds none; torch searches further
    assert torch.load(tmp_path / 'bomb', weights_only=True)
    assert 'not a zip file' in reason(tmp_path / 'bomb')


@pytest.mark.parametrize('method', [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_archive_that_unpacks_to_more_than_it_declares_is_refused_unread(tmp_path, method):
    with zipfile.ZipFile(tmp_path / 'bomb', 'w', method) as bomb:
        bomb.writestr('archive/data.pkl', bytes(2**25))
    content = bytearray((tmp_path / 'bomb').read_bytes())
    directory = content.rfind(b'PK\1\2')
    content[22:26] = content[directory + 24 : directory + 28] = (100).to_bytes(4, 'little')
    (tmp_path / 'bomb').write_bytes(content)
    assert 'a compressed zip archive' in reason(tmp_path / 'bomb')


def with_pickle(path, content):
    """Save a checkpoint and replace its pickle."""
    torch.save({'a': torch.ones(1)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, 'w') as archive:
        for name, value in entries.items():
            archive.writestr(name, content if name.endswith('data.pkl') else value)
    return path


def legacy(path, content):
    """Write a checkpoint in the format before archives, with another pickle instead of its own."""
    start = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {'little_endian': True})]
    path.write_bytes(b''.join([*start, content, pickle.dumps([], 2)]))
    return path


HUGE = b'\x80\x02cbuiltins\nbytearray\n\x8a\x05' + (2**34).to_bytes(5, 'little') + b'\x85R.'  # bytearray(2**34)
DOUBLED = b'\x80\x02' + b'c_codecs\nencode\n' * 31 + b'X\1\0\0\0aX\5\0\0\0utf-8\x86R' + b'X\3\0\0\0hex\x86R' * 30 + b'.'
NESTED = (  # t = (t, t, t), thirty times, as a key: hashing it visits 3 ** 30 objects
    b'\x80\x02})q\0' + b''.join(b'h%ch%ch%c\x87q%c' % (i, i, i, i + 1) for i in range(30)) + b'K\1s.'
)


def words(*texts):
    """The operations that push and memoize texts in protocol 4."""
    return b''.join(b'\x8c%c%s\x94' % (len(text), text) for text in texts)


HUGE_4 = b'\x80\4' + words(b'builtins', b'bytearray') + b'\x93\x8a\5' + (2**34).to_bytes(5, 'little') + b'\x85R.'
HIDDEN_4 = b'\x80\4' + words(b'torch', b'Size\nR.cbuiltins\nbytearray') + b'\x93.'
NESTED_4 = b'\x80\4' + NESTED[2:].replace(b'})q\0', b'})\x94')
LONG_4 = b'\x80\4' + words(b'x' * 199) + b'h\0' * 2**20 + b'.'  # 2 bytes each, replaced by 200


@pytest.mark.parametrize('write', [with_pickle, legacy])
@pytest.mark.parametrize(
    'content, message',
    [
        (HUGE_4, "'builtins bytearray' in it is neither"),
        (HIDDEN_4, "'Size\\nR.cbuiltins\\nbytearray' in it is not a name"),
        (NESTED_4, '10,000,000 objects'),
        (LONG_4, 'grows 8-fold'),
        (b'\x80\4' + words(b'torch') + b'\x93.', 'is not a checkpoint'),
        (b'\x80\4' + words(b'torch') + b'}\x93.', 'is not a checkpoint'),
        (b'\x80\4' + words(b'torch', b'Size') + b'K\1\x93.', 'is not a checkpoint'),
    ],
)
def test_a_hostile_pickle_of_protocol_4_is_refused_as_one_of_protocol_2(tmp_path, write, content, message):
    since = time.process_time()
    assert message in reason(write(tmp_path / 'pickle', content))
    assert time.process_time() - since < 60


@pytest.mark.parametrize('write', [with_pickle, legacy])
@pytest.mark.parametrize(
    'content, message',
    [
        (HUGE, "'builtins bytearray' in it is neither"),
        (DOUBLED, "'_codecs encode' in it"),
        (NESTED, '10,000,000 objects'),
    ],
)
def test_a_short_pickle_of_gigabytes_or_years_is_refused_at_once(tmp_path, write, content, message):
    assert len(content) < 2000
    since = time.process_time()
    assert message in reason(write(tmp_path / 'pickle', content))
    assert time.process_time() - since < 10  # CPU time, which other processes do not change


def test_a_second_directory_in_an_archive_is_not_what_torch_reads(tmp_path):
    """The end of an archive points to its directory; zipfile reads the one just before the end instead."""
    path = with_pickle(tmp_path / 'two', pickle.dumps({'a': 1}, 2))
    content = path.read_bytes()
    end = content.rindex(b'PK\5\6')
    size, start = struct.unpack('<II', content[end + 12 : end + 20])
    directory = content[start : start + size]
    other = directory.replace(b'data.pkl', b'atad.pkl')
    path.write_bytes(content[:start] + directory + other + content[end:])
    assert torch.load(path, weights_only=True) == {'a': 1}
    with pytest.raises(ValueError, match='is not a checkpoint'):
        read.read(path)
