"""Every flag is documented, read, and refuses what makes no sense in one line."""

import inspect
import pathlib
import re
import sys

import pytest
from conftest import refused

import cifar
import options

ROOT = pathlib.Path(cifar.__file__).parent

WRONG = {  # flag: values that it has to refuse
    'dataset': ['MNIST', ''],
    'image_size': ['0', '7', '1000000', '32.5'],
    'randomcrop_pad': ['-1', '2.5', '32', 'nan', 'four'],
    'dataroot': [],  # read for folder and CIFAR alone
    'holdout': ['-1', '0.5', 'many', '1000'],
    'teacher_id': ['nobody', '../..'],
    'depth': ['0', '-16', '15', '16.0', 'deep', '9' * 30],
    'width': ['0', '-1', 'nan', 'inf', '1e9', 'wide'],
    'dtype': ['float8', ''],
    'epochs': ['0', '-1', '1.5', '1e3'],
    'batch_size': ['0', '1', '-128', '1e2'],
    'lr': ['0', '-0.1', 'nan', 'inf', 'fast'],
    'epoch_step': ['60', '[60', '[2,1]', '[1,1]', '[0]', '[1.5]', '["1"]', '[true]', '{}', '[' * 100_000, 'null'],
    'lr_decay_ratio': ['-1', 'nan', 'inf'],
    'weight_decay': ['-1', 'nan', 'inf'],
    'seed': ['-1', '1.5', str(2**63)],
    'alpha': ['-0.1', '1.1', 'nan', '0.5'],  # the last for want of a teacher
    'temperature': ['0', '-4', 'nan', 'inf'],
    'beta': ['-1', 'nan', 'inf', '1000'],
    'beta_decay': ['cubic'],
    'at_form': ['sum'],
    'mapping': ['mean'],
    'power': ['0', '-2', 'nan', '1e9'],
    'groups': ['a', '-1', '1,', '0,0', '1.5', '²', '9' * 5000],
    'save': ['blocked'],
    'resume': ['auto', 'nowhere.pt7', 'blocked'],
    'overwrite': ['yes'],
    'nthread': ['-1', '1.5', '1000000'],
    'ngpu': ['0', '-1', '1.5', '999', '1000000'],
    'gpu_id': [],
    'sync_bn': ['yes'],
    'max_restarts': ['-1', '1.5'],
}


def parser(monkeypatch, words=()):
    """The parser of cifar.py, caught as it parses `words`."""
    caught = []
    parse_args = options.Parser.parse_args
    monkeypatch.setattr(sys, 'argv', ['cifar.py', *words])
    monkeypatch.setattr(options.Parser, 'parse_args', lambda self: caught.append(self) or parse_args(self))
    opt = cifar.parse()
    return caught[0], opt


def test_every_flag_is_tried_with_wrong_values(monkeypatch):
    assert set(vars(parser(monkeypatch)[1])) == set(WRONG)


@pytest.mark.parametrize('flag, value', [(flag, value) for flag, values in WRONG.items() for value in values])
def test_wrong_value_is_refused_in_one_line_and_nothing_is_written(script, tmp_path, flag, value):
    (tmp_path / 'blocked').write_text('a file')
    result = script(cifar, '--dataset digits --epochs 1' if flag != 'dataset' else '', [f'--{flag}={value}'])
    assert refused(result)
    assert [p.name for p in tmp_path.iterdir()] == ['blocked']


def test_every_flag_is_read_somewhere(monkeypatch):
    sources = ''.join((ROOT / f'{name}.py').read_text() for name in ('cifar', 'engine', 'options'))
    by_name = set(cifar.TEST_SET)
    for flag in vars(parser(monkeypatch)[1]):
        assert re.search(rf'\bopt\.{flag}\b', sources) or flag in by_name, f'--{flag} is never read'


def test_every_flag_is_explained(monkeypatch):
    for action in parser(monkeypatch)[0]._actions:
        assert action.help, action.option_strings


def test_unknown_flag_is_refused(script):
    assert refused(script(cifar, '--learning_rate 0.1'), 'unrecognized arguments: --learning_rate')


UPSTREAM = [  # the commands that the authors' README gives
    '--save logs/resnet_40_1_teacher --depth 40 --width 1',
    '--save logs/resnet_16_2_teacher --depth 16 --width 2',
    '--save logs/resnet_16_1_teacher --depth 16 --width 1',
    '--save logs/at_16_1_16_2 --teacher_id resnet_16_2_teacher --beta 1e+3',
    '--save logs/kd_16_1_16_2 --teacher_id resnet_16_2_teacher --alpha 0.9',
]


@pytest.mark.parametrize('command', UPSTREAM)
def test_the_authors_commands_are_understood(monkeypatch, command):
    opt = parser(monkeypatch, command.split())[1]
    assert (opt.lr, opt.epochs, opt.batch_size, opt.weight_decay) == (0.1, 200, 128, 0.0005)
    assert (opt.epoch_step, opt.lr_decay_ratio, opt.temperature) == ('[60,120,160]', 0.2, 4)


def test_early_spellings_mean_the_same(monkeypatch):
    opt = parser(monkeypatch, '--batchSize 64 --weightDecay 1e-4 --data_root here'.split())[1]
    assert (opt.batch_size, opt.weight_decay, opt.dataroot) == (64, 1e-4, 'here')


def test_flags_that_contradict_each_other_are_refused(script):
    assert refused(script(cifar, '--alpha 0.9'), '--alpha needs a teacher')
    assert refused(script(cifar, '--beta 1'), '--beta needs a teacher')
    assert refused(script(cifar, '--resume auto'), '--save, which is not given')
    assert refused(script(cifar, '--resume auto --save x --overwrite'), 'contradict')
    assert refused(script(cifar, '--ngpu 2 --batch_size 3'), '--batch_size 3 is not a multiple of the 2 workers')


def test_main_is_a_table_of_contents():
    for script in ('cifar', 'reproduce', 'checkpoint'):
        assert len(inspect.getsource(__import__(script).main).splitlines()) <= 40
