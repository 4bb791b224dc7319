"""Every flag is documented, is read, and refuses senseless values in one line."""

import argparse
import importlib
import inspect
import pathlib
import re
import sys
import time
import types

import pytest
import torch
from conftest import refused

import cifar
import finetune
import imagenet
from engine.arguments import Parser
from utils import DTYPES

ROOT = pathlib.Path(cifar.__file__).parent

WRONG = {  # flag: values that it has to refuse
    'dataset': ['MNIST', ''],
    'image_size': ['0', '7', '1000000', '32.5'],
    'randomcrop_pad': ['-1', '2.5', '32', 'nan', 'four'],
    'dataroot': [],  # only read for folder and CIFAR
    'follow_links': ['yes'],
    'holdout': ['-1', '0.5', 'many', '1000'],
    'teacher_id': ['nobody', '../..'],
    'depth': ['0', '-16', '15', '16.0', 'deep', '9' * 30],
    'width': ['0', '-1', 'nan', 'inf', '1e9', 'wide'],
    'dtype': ['float8', ''],
    'teacher_dtype': ['int4', 'int8'],
    'compile': ['yes'],
    'cuda_graphs': ['yes'],
    'epochs': ['0', '-1', '1.5', '1e3', '9' * 400],
    'batch_size': ['0', '1', '-128', '1e2', '9' * 30],
    'lr': ['0', '-0.1', 'nan', 'inf', '1e300', 'fast'],
    'epoch_step': ['60', '[60', '[2,1]', '[1,1]', '[0]', '[1.5]', '["1"]', '[true]', '{}', '[' * 100_000, 'null'],
    'lr_decay_ratio': ['-1', '1.1', 'nan', 'inf'],
    'weight_decay': ['-1', 'nan', 'inf', '1e300'],
    'seed': ['-1', '1.5', str(2**63)],
    'alpha': ['-0.1', '1.1', 'nan', '0.5'],  # the last without a teacher
    'temperature': ['0', '-4', 'nan', 'inf', '1e300', '1e-300', '1001'],
    'beta': ['-1', 'nan', 'inf', '1e300', '1000'],
    'beta_decay': ['cubic'],
    'transfer': ['attention', 'full', 'gradient'],  # the last two without --beta
    'penalty': ['l2', 'symmetry'],  # without --gamma
    'gamma': ['-1', 'nan', 'inf', '1e300', '1'],  # the last without --penalty
    'net': ['resnet', ''],
    'no_bn': ['yes'],
    'at_form': ['sum'],
    'mapping': ['mean'],
    'power': ['0', '-2', 'nan', '1e9'],
    'groups': ['a', '-1', '1,', '0,0', '1.5', '²', '9' * 5000],
    'evaluate': ['nowhere', 'blocked'],
    'json': ['yes'],
    'save': ['blocked'],
    'resume': ['auto', 'nowhere.pt7', 'blocked'],
    'keep_momentum': ['yes'],
    'verbose': ['yes'],
    'deterministic': ['yes'],
    'tensorboard': ['yes', ''],
    'save_every': ['-1', 'nan', 'inf', 'often'],
    'overwrite': ['yes'],
    'nthread': ['-1', '1.5', '1000000'],
    'ngpu': ['0', '-1', '1.5', '999', '1000000'],
    'gpu_id': ['0;1', 'a', '0,', '-1'],
    'sync_bn': ['yes'],
    'max_restarts': ['-1', '1.5'],
}


IMAGENET_WRONG = {  # the flags that only imagenet.py has, or reads differently
    'imagenetpath': ['nowhere'],
    'holdout': ['-1', '0.5', 'many'],
    'image_size': ['0', '31', '32.5', '1000000'],
    'skip_bad_images': ['yes'],
    'teacher_params': [],  # in test_imagenet.py, with data
    'skip_teacher_check': ['yes'],
    'depth': ['0', '-18', '20', '18.0'],
}
FINETUNE_WRONG = {  # the same for finetune.py
    'dataset': ['birds', ''],
    'dataroot': ['nowhere'],
    'holdout': ['-1', '0.5', 'many'],
    'image_size': ['0', '31', '32.5', '1000000'],
    'skip_bad_images': ['yes'],
    'teacher_params': [],  # in test_finetune.py, with data
    'skip_teacher_check': ['yes'],
    'pretrained': [],  # likewise
    'fixed_groups': ['-1', '5', '1.5'],
    'lr': ['0'],
    'groups': ['a'],
}
CIFAR_ONLY = {'net', 'no_bn', 'dataset', 'dataroot', 'randomcrop_pad', 'teacher_id'}


def parser(monkeypatch, words=(), module=cifar):
    """The parser of a script, captured while it parses `words`, and the flags."""
    caught = []
    parse_args = Parser.parse_args
    monkeypatch.setattr(sys, 'argv', [f'{module.__name__}.py', *words])
    monkeypatch.setattr(Parser, 'parse_args', lambda self, *_: caught.append(self) or parse_args(self))
    opt = module.parse()
    return caught[0], opt


def test_every_flag_is_tried_with_wrong_values(monkeypatch):
    assert set(vars(parser(monkeypatch)[1])) == set(WRONG)
    found = set(vars(parser(monkeypatch, module=imagenet)[1]))
    assert found == (set(WRONG) - CIFAR_ONLY) | set(IMAGENET_WRONG)
    found = set(vars(parser(monkeypatch, module=finetune)[1]))
    assert found == (set(WRONG) - CIFAR_ONLY - {'depth', 'width'}) | set(FINETUNE_WRONG)


@pytest.mark.parametrize('flag, value', [(flag, value) for flag, values in WRONG.items() for value in values])
def test_wrong_value_is_refused_in_one_line_and_nothing_is_written(script, tmp_path, flag, value):
    (tmp_path / 'blocked').write_text('a file')
    result = script(cifar, '--dataset digits --epochs 1' if flag != 'dataset' else '', [f'--{flag}={value}'])
    assert refused(result)
    assert [p.name for p in tmp_path.iterdir()] == ['blocked']


@pytest.mark.parametrize('flag, value', [(flag, value) for flag, values in IMAGENET_WRONG.items() for value in values])
def test_wrong_value_for_imagenet_is_refused_in_one_line_that_names_it(script, tmp_path, flag, value):
    result = script(imagenet, '--imagenetpath .', [f'--{flag}={value}'])
    assert refused(result, value if flag == 'imagenetpath' else f'--{flag}')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('flag, value', [(flag, value) for flag, values in FINETUNE_WRONG.items() for value in values])
def test_wrong_value_for_fine_tuning_is_refused_in_one_line_that_names_it(script, tmp_path, flag, value):
    assert refused(script(finetune, [f'--{flag}={value}']), value if flag == 'dataroot' else f'--{flag}')
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('module', [cifar, imagenet, finetune])
def test_every_flag_is_read_and_explained(monkeypatch, module):
    shared = [
        ROOT / 'formats' / 'networks.py',
        *(path for path in (ROOT / 'engine').glob('*.py') if module is not cifar or path.stem != 'photographs'),
    ]
    sources = ''.join(path.read_text(encoding='utf-8') for path in (ROOT / f'{module.__name__}.py', *shared))
    actions, flags = parser(monkeypatch, module=module)
    for flag in vars(flags):
        by_name = module is cifar and flag in cifar.TEST_SET
        assert re.search(rf'\bopt\.{flag}\b', sources) or by_name, f'--{flag} is never read'
    explained = ' '.join(actions.format_help().split())
    for action in actions._actions:
        assert action.help, action.option_strings
        named = f'(default: {action.default})' in explained or 'default: ' in action.help
        assert named or action.default in (None, False, '', argparse.SUPPRESS), f'no default of {action.dest}'


OTHERS = {  # of the other scripts: {words: {flag: values that it has to refuse}}
    'reproduce table1 --show': {
        'rows': ['0', '5', 'x', '1,,2', '9' * 5000],
        'methods': ['foo', 'at,', 'student,at-sum1'],
        'seeds': ['0', '-1', '1.5', '1000000'],
        'epochs': ['0', '-1', '1e3'],
        'holdout': ['-1', '0.5'],
        'dtype': ['float8'],
        'jobs': ['0', '-1', '1.5', '1000000'],
        'compile': ['yes'],
        'cuda_graphs': ['yes'],
        'all': ['yes'],
        'dry_run': ['yes'],
        'show': ['yes'],
        'markdown': ['nowhere.md', 'nowhere/a.md'],
        'dataroot': [],  # only passed on to cifar.py
    },
    'plot curves log.txt': {'label': [], 'test_only': ['yes'], 'out': ['a', 'a.jpg', 'nowhere/a.png']},
    'plot csv log.txt': {'out': ['nowhere/a.csv']},
    'plot attention --model a --model b --images digits': {
        'model': ['c', ''],
        'label': ['one'],
        'images': ['nowhere', ''],
        'dataroot': [],
        'count': ['0', '-1', '33', '1.5'],
        'image_size': ['7', '1025', '1.5'],
        'mapping': ['mean'],
        'power': ['0', '-1', 'nan', '17'],
        'out': ['a', 'a.jpg', 'nowhere/a.png'],
    },
    'checkpoint predict run a.jpg': {
        'top': ['0', '-1', '1.5', '9' * 400],
        'image_size': ['7', '1025', '1.5'],
        'json': ['yes'],
    },
    'checkpoint export run out --to hkl': {
        'to': ['jpeg', ''],
        'image_size': ['0', '-1', '5000', '1.5'],
        'overwrite': ['yes'],
    },
}
CASES = [(words, flag, value) for words, of in OTHERS.items() for flag, values in of.items() for value in values]


@pytest.mark.parametrize('words, flag, value', CASES)
def test_wrong_value_for_another_script_is_refused_in_one_line(script, words, flag, value):
    name, *rest = words.split()
    assert refused(script(importlib.import_module(name), *rest, [f'--{flag}={value}']))


@pytest.mark.parametrize('words', OTHERS)
def test_every_flag_of_another_script_is_tried_with_wrong_values(monkeypatch, words):
    found, (name, *rest) = [], words.split()
    parse_args = Parser.parse_args
    monkeypatch.setattr(sys, 'argv', [name, *rest])
    monkeypatch.setattr(Parser, 'parse_args', lambda self: found.append(parse_args(self)) or sys.exit())
    with pytest.raises(SystemExit):
        importlib.import_module(name).main()
    assert set(vars(found[0])) - {'table', 'command', 'logs', 'run', 'images' if name == 'checkpoint' else ''} - set(
        rest
    ) == set(OTHERS[words])


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


def test_the_authors_imagenet_command_is_understood(monkeypatch):
    command = (
        '--imagenetpath ~/ILSVRC2012 --depth 18 --width 1 --teacher_params resnet-34-export.hkl --gpu_id 0,1 --ngpu 2'
    )
    opt = parser(monkeypatch, f'{command} --beta 1e+3'.split(), imagenet)[1]
    assert (opt.lr, opt.epochs, opt.batch_size, opt.weight_decay) == (0.1, 100, 256, 0.0001)
    assert (opt.epoch_step, opt.lr_decay_ratio, opt.ngpu, opt.beta) == ('[30,60,90]', 0.1, 2, 1000)


def test_early_spellings_mean_the_same(monkeypatch):
    opt = parser(monkeypatch, '--batchSize 64 --weightDecay 1e-4 --data_root here'.split())[1]
    assert (opt.batch_size, opt.weight_decay, opt.dataroot) == (64, 1e-4, 'here')
    same = {'float32': 'float', 'float64': 'double', 'float16': 'half'}
    for name in DTYPES:
        assert parser(monkeypatch, ['--dtype', name])[1].dtype == same.get(name, name)


def test_flags_that_contradict_each_other_are_refused(script):
    assert refused(script(cifar, '--alpha 0.9'), '--alpha needs a teacher')
    assert refused(script(cifar, '--beta 1'), '--beta needs a teacher')
    assert refused(script(cifar, '--no_bn'), '--net nin')
    assert refused(script(cifar, '--teacher_id x --beta 1 --transfer gradient --groups 1'), '--groups: gradients')
    assert refused(
        script(cifar, '--teacher_id x --beta 1 --transfer full --power 4'),
        '--power belongs to --transfer activation alone, not to --transfer full',
    )
    for flags in ('--at_form paper', '--teacher_id x --alpha 0.9 --at_form paper'):
        assert refused(script(cifar, flags), '--at_form does nothing without the weight of the transfer, --beta')
    assert refused(script(cifar, '--max_restarts 1'), '--max_restarts goes with --ngpu')
    assert refused(script(cifar, '--resume auto'), '--save, which is not given')
    assert refused(script(cifar, '--resume auto --save x --overwrite'), 'contradict')
    assert refused(script(cifar, '--dataset digits --cuda_graphs'), '--compile')
    assert refused(script(cifar, '--ngpu 2 --batch_size 3'), '--batch_size 3 is not a multiple of the 2 workers')


def test_running_out_of_memory_is_told_in_one_line(script):
    greedy = types.SimpleNamespace(__name__='greedy', main=lambda: torch.empty(2**50))
    status, _, err = script(greedy)
    assert status == 1 and err.count('\n') == 1 and err.startswith('greedy.py: error: out of memory'), err


def test_a_network_that_no_memory_holds_takes_none_before_the_rest_is_checked(script):
    since = time.process_time()
    assert refused(script(cifar, '--dataset folder --dataroot nowhere --width 100 --depth 100'), 'nowhere')
    assert time.process_time() - since < 30  # it has 15 billion parameters


def test_main_is_a_table_of_contents():
    for script in ('cifar', 'imagenet', 'reproduce', 'checkpoint', 'plot'):
        assert len(inspect.getsource(__import__(script).main).splitlines()) <= 40
