"""Checkpoints: whole or not there, data and never code, ours and the authors'."""

import os
import pickle
import resource

import pytest
import torch
from conftest import refused

import checkpoint
import resnet
import runs

STATE = {'params': {'a': torch.arange(5.0), 'b.c': torch.ones(2, 3)}, 'optimizer': {'a': torch.zeros(5)}, 'epoch': 3}


def test_what_is_saved_is_loaded(tmp_path):
    path = tmp_path / 'model.pt7'
    checkpoint.save(path, STATE)
    loaded = checkpoint.load(path)
    assert loaded['epoch'] == 3 and set(loaded) == set(STATE)
    assert all(torch.equal(loaded['params'][k], v) for k, v in STATE['params'].items())
    assert os.listdir(tmp_path) == ['model.pt7']


def test_no_space_left_leaves_the_previous_checkpoint_whole(tmp_path):
    path = tmp_path / 'model.pt7'
    checkpoint.save(path, STATE)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # the system refuses longer files from here on
    try:
        with pytest.raises(OSError, match='model.pt7 could not be written: .*; what was there before is whole'):
            checkpoint.save(path, {**STATE, 'params': {'a': torch.zeros(100_000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ['model.pt7']


def test_nothing_is_written_through_a_link(tmp_path):
    mine, path = tmp_path / 'mine', tmp_path / 'model.pt7'
    mine.write_text('mine')
    for link in (path, tmp_path / 'model.pt7.tmp', tmp_path / 'log.txt'):
        link.symlink_to(mine)
    checkpoint.save(path, STATE)
    with pytest.raises(OSError, match='log.txt could not be written'):
        runs.append_line(str(tmp_path / 'log.txt'), 'line')
    assert mine.read_text() == 'mine' and checkpoint.load(path)['epoch'] == 3


def test_a_checkpoint_cut_short_anywhere_is_refused(tmp_path):
    path = tmp_path / 'model.pt7'
    checkpoint.save(path, STATE)
    content = path.read_bytes()
    for tenth in range(10):
        path.write_bytes(content[: len(content) * tenth // 10])
        with pytest.raises(ValueError, match='model.pt7 is not a checkpoint'):
            checkpoint.load(path)


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, 'w')


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    path, trace = tmp_path / 'model.pt7', tmp_path / 'trace'
    torch.save({'params': {'a': Touch(str(trace))}}, path)
    with pytest.raises(ValueError, match='is not a checkpoint'):
        checkpoint.load(path)
    path.write_bytes(pickle.dumps(Touch(str(trace))))
    with pytest.raises(ValueError, match='is not a checkpoint'):
        checkpoint.load(path)
    assert not trace.exists()


@pytest.mark.parametrize(
    'state',
    [3, [], {}, {'params': 3}, {'params': [torch.ones(1)]}, {'params': {'a': 1}}, {'params': {3: torch.ones(1)}}],
)
def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path, state):
    torch.save(state, tmp_path / 'model.pt7')
    with pytest.raises(ValueError, match='model.pt7 is not a checkpoint'):
        checkpoint.load(tmp_path / 'model.pt7')
    with pytest.raises(OSError, match='no such checkpoint'):
        checkpoint.load(tmp_path / 'other.pt7')


def trained_wide_resnet(width=1):
    torch.manual_seed(0)
    f, params = resnet.wide_resnet(10, width, 4)
    return f, {k: torch.rand_like(v) + 0.5 for k, v in params.items()}


def same_logits(f, params, path):
    g, loaded = checkpoint.load_teacher(path)
    x = torch.randn(2, 3, 16, 16)
    assert not any(v.requires_grad for v in loaded.values())
    return torch.equal(f(x, params, False)[0], g(x, loaded, False)[0])


@pytest.mark.parametrize('width', [1, 0.5, 1.03])
def test_a_teacher_is_rebuilt_from_its_parameters(tmp_path, width):
    f, params = trained_wide_resnet(width)
    checkpoint.save(tmp_path / 'model.pt7', {'params': params})
    assert same_logits(f, params, tmp_path / 'model.pt7')


def test_the_authors_layouts_are_read(tmp_path):
    f, params = trained_wide_resnet()
    both = {f'student.{k}': v for k, v in params.items()} | {f'teacher.{k}': v + 1 for k, v in params.items()}
    torch.save({'params': both, 'epoch': 200}, tmp_path / 'merged.pt7')
    assert same_logits(f, params, tmp_path / 'merged.pt7')
    apart = {
        'stats': {k: v for k, v in params.items() if 'running' in k},
        'params': {k: v for k, v in params.items() if 'running' not in k},
    }
    torch.save(apart, tmp_path / 'apart.pt7')
    assert same_logits(f, params, tmp_path / 'apart.pt7')
    merged = {part: {f'student.{k}': v for k, v in tensors.items()} for part, tensors in apart.items()}
    torch.save(merged, tmp_path / 'merged_apart.pt7')
    assert same_logits(f, params, tmp_path / 'merged_apart.pt7')


def test_what_does_not_fit_is_named(tmp_path):
    path, (_, params) = tmp_path / 'model.pt7', trained_wide_resnet()

    def message(changed):
        checkpoint.save(path, {'params': changed})
        with pytest.raises(ValueError) as error:
            checkpoint.load_teacher(path)
        return str(error.value)

    without = {k: v for k, v in params.items() if k != 'group1.block0.conv1'}
    assert 'no group1.block0.conv1' in message(without)
    assert 'unknown extra' in message({**params, 'extra': torch.ones(1)})
    assert 'conv0 is (3, 3), not (16, 3, 3, 3)' in message({**params, 'conv0': torch.ones(3, 3)})
    assert 'conv0 is torch.int64' in message({**params, 'conv0': torch.ones(16, 3, 3, 3).long()})
    assert 'no wide ResNet' in message({'weight': torch.ones(1)})


def test_slim_keeps_the_parameters_alone(tmp_path, script):
    run = tmp_path / 'run'
    run.mkdir()
    checkpoint.save(run / 'model.pt7', STATE)
    status, out, _ = script(checkpoint, 'slim', [run])
    assert status == 0 and 'bytes before' in out
    slimmed = checkpoint.load(run / 'model.pt7')
    assert set(slimmed) == {'params', 'epoch'} and torch.equal(slimmed['params']['a'], STATE['params']['a'])
    assert refused(script(checkpoint, 'slim', [tmp_path / 'nowhere']), 'no such checkpoint')
