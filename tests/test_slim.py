"""A checkpoint is slimmed when its run is finished, and keeps what teaches."""

import shutil

import torch
from conftest import refused
from test_checkpoint import STATE

import checkpoint
from engine import runs
from formats import networks, write


def test_a_run_that_was_stopped_within_an_epoch_is_not_slimmed(script, tmp_path):
    write.save(tmp_path / 'model.pt7', {**STATE, 'progress': {'steps': 1}})
    before = (tmp_path / 'model.pt7').read_bytes()
    assert refused(script(checkpoint, 'slim', [tmp_path]), 'was stopped within an epoch', '--resume auto')
    assert (tmp_path / 'model.pt7').read_bytes() == before


def test_a_run_that_is_not_finished_by_its_log_is_not_slimmed_but_a_copy_of_its_file_is(script, tmp_path):
    write.save(tmp_path / 'model.pt7', STATE)
    before = (tmp_path / 'model.pt7').read_bytes()
    (tmp_path / 'log.txt').write_text('json_stats: {"epoch": 3, "epochs": 4}\n')
    assert refused(script(checkpoint, 'slim', [tmp_path]), 'model.pt7 lacks 1 of 4 epochs: first finish', 'slim a copy')
    assert (tmp_path / 'model.pt7').read_bytes() == before
    (tmp_path / 'copy').mkdir()
    shutil.copy(tmp_path / 'model.pt7', tmp_path / 'copy')
    assert script(checkpoint, 'slim', [tmp_path / 'copy'])[0] == 0
    (tmp_path / 'log.txt').write_text('json_stats: {"epoch": 4, "epochs": 4}\n')
    assert script(checkpoint, 'slim', [tmp_path])[0] == 0


def test_a_run_that_is_training_is_not_slimmed(script, tmp_path):
    write.save(tmp_path / 'model.pt7', STATE)
    before = (tmp_path / 'model.pt7').read_bytes()
    with runs.locked(str(tmp_path)):
        assert refused(script(checkpoint, 'slim', [tmp_path]), f'another process trains into {tmp_path}')
    assert (tmp_path / 'model.pt7').read_bytes() == before


def test_slim_keeps_the_parameters_alone(tmp_path, script):
    run = tmp_path / 'run'
    run.mkdir()
    write.save(run / 'model.pt7', STATE)
    status, out, _ = script(checkpoint, 'slim', [run])
    assert status == 0 and 'bytes before' in out
    slimmed = networks.load(run / 'model.pt7')
    assert set(slimmed) == {'params', 'epoch'} and torch.equal(slimmed['params']['a'], STATE['params']['a'])
    assert refused(script(checkpoint, 'slim', [tmp_path / 'nowhere']), 'no such checkpoint')
