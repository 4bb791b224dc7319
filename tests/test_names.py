"""File names: ~ in every flag, names in any encoding, and terminals and texts in any encoding."""

import argparse
import ast
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys

import pytest
from conftest import HANGS, SMALL, refused

import checkpoint
import cifar
import finetune
import imagenet
import plot
import reproduce
from engine import arguments
from engine.log import read_log

ROOT = pathlib.Path(cifar.__file__).parent
SCRIPTS = [cifar, imagenet, finetune, reproduce, plot, checkpoint]
OTHERS = ['benchmarks/epoch.py', 'benchmarks/input.py', 'benchmarks/scale.py', 'benchmarks/step.py']
OTHERS += ['examples/own_networks.py']
NO_PATHS = {'dataset', 'label', 'rows', 'methods', 'only'}  # flags that take any text and do not name a file


def script_of(name, monkeypatch):
    """A script in another folder, as a module."""
    folder, _, file = name.partition('/')
    monkeypatch.syspath_prepend(str(ROOT / folder))
    return importlib.import_module(file.removesuffix('.py'))


def actions_of(module, monkeypatch):
    """The actions of a script's parser and of its subcommands."""
    caught = []
    monkeypatch.setattr(arguments.Parser, 'parse_args', lambda self, *_: caught.append(self) or sys.exit())
    with pytest.raises(SystemExit):
        module.main()
    actions = caught[0]._actions
    below = [a for a in actions if isinstance(a, argparse._SubParsersAction)]
    return [a for a in actions if a not in below] + [a for b in below for p in b.choices.values() for a in p._actions]


@pytest.mark.parametrize('script', [*SCRIPTS, *OTHERS], ids=lambda s: getattr(s, '__name__', s))
def test_every_flag_that_names_a_file_or_folder_knows_the_home_folder(script, monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path))
    module = script_of(script, monkeypatch) if isinstance(script, str) else script
    for action in actions_of(module, monkeypatch):
        free = action.nargs != 0 and not action.choices and action.dest not in NO_PATHS
        if free and action.type in (None, arguments.path, plot.picture):
            assert action.type, f'{action.dest} takes a text: is it of type arguments.path, or no path?'
            assert action.type('~/a.png') == str(tmp_path / 'a.png')
            assert action.type is plot.picture or action.type('torchvision:resnet34') == 'torchvision:resnet34'


def test_a_home_folder_behind_an_equals_sign_is_written_to(script, train, monkeypatch, tmp_path):
    monkeypatch.setenv('HOME', str(tmp_path / 'home'))
    status, _, err = train('--epochs 1 --save=~/run')
    assert status == 0 and os.listdir(tmp_path) == ['home'], err
    assert train('--epochs 2 --epoch_step [] --save=~/run --resume=~/run/model.pt7')[0] == 0
    assert script(checkpoint, 'export --to=upstream ~/run ~/out.pth')[0] == 0
    assert script(plot, 'curves ~/run --out=~/curves.svg')[0] == 0
    assert sorted(os.listdir(tmp_path / 'home')) == ['curves.svg', 'out.pth', 'run']


def run(script, *words, **environment):
    """Run a script in its own process: exit status, stdout and stderr."""
    command = [sys.executable, str(ROOT / script), *words]
    done = subprocess.run(
        command, env={**os.environ, 'OMP_NUM_THREADS': '1', **environment}, capture_output=True, timeout=HANGS
    )
    return done.returncode, *(stream.decode(errors='replace') for stream in (done.stdout, done.stderr))


def test_what_nobody_reads_any_more_ends_quietly():
    network = str(ROOT / 'logs' / 'cifar10-e16' / 'wrn-16-2-s0')
    for words in (['checkpoint.py', 'info', network], ['plot.py', 'table', network]):
        command = [sys.executable, str(ROOT / words[0]), *words[1:]]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        process.stdout.close()
        assert process.stderr.read() == b'' and process.wait(HANGS) == -signal.SIGPIPE


def test_names_of_any_bytes_are_printed_trained_on_and_logged_on_any_terminal(photos, tmp_path):
    environment = {'PYTHONIOENCODING': 'ascii', 'LC_ALL': 'C'}
    root = tmp_path / os.fsdecode(b'f\xfctos')
    for part in ('train', 'test', 'val'):
        for name, now in (('ant', b'caf\xc3\xa9'), ('bee', b'caf\xe9')):
            (root / part / os.fsdecode(now)).mkdir(parents=True)
            for path in sorted((photos / part.replace('val', 'test') / name).iterdir())[:6]:
                (root / part / os.fsdecode(now) / path.name).write_bytes(path.read_bytes())
        (root / part / os.fsdecode(now) / os.fsdecode(b'\xe9.txt')).touch()
    bad = root / 'train' / os.fsdecode(now) / os.fsdecode(b'\xe9.png')
    bad.write_bytes(b'')
    save = tmp_path / os.fsdecode(b'caf\xc3\xa9-\xff')
    flags = ['--epochs', '1', '--epoch_step', '[]', '--save', str(save)]
    status, out, err = run('cifar.py', *SMALL.split(), *flags, '--dataroot', str(root), **environment)
    assert refused((status, out, err), 'is not a readable image'), err
    small = '--image_size 32 --width 0.0625 --batch_size 13 --nthread 1 --imagenetpath'.split()
    status, out, err = run('imagenet.py', *small, str(root), *flags, '--overwrite', **environment)
    assert status == 0 and 'warning: ' in err and 'note: a file in' in out and 'Traceback' not in err, err
    bad.unlink()
    words = [*flags, '--overwrite', '--ngpu', '2', '--dataroot', str(root)]
    status, out, err = run('cifar.py', *SMALL.split(), *words, **environment)
    assert status == 0 and out.count('note: a file in') == 2, err
    (record,) = read_log(save / 'log.txt')
    assert record['save'] == str(save) and record['train_images'] == 12
    status, out, err = run(
        'plot.py', 'curves', str(save), '--label', save.name, '--out', str(save / 'a.svg'), **environment
    )
    assert status == 0 and '\\udcff' in (save / 'a.svg').read_text(encoding='utf-8'), err
    status, out, err = run('checkpoint.py', 'info', str(save), **environment)
    assert status == 0 and '\\udcff' in out, err


@pytest.mark.parametrize('encoding', ['utf-8-sig', 'latin-1'])
def test_a_log_of_windows_is_read(tmp_path, encoding):
    log = tmp_path / 'log.txt'
    text = ''.join(f'json_stats: {json.dumps({"epoch": i, "save": "é"}, ensure_ascii=False)}\r\né\r\n' for i in (1, 2))
    log.write_bytes(text.encode(encoding) + text.encode(encoding))  # a mark before each half
    assert [record['epoch'] for record in read_log(log)] == [1, 2, 1, 2]
    log.write_bytes(text.encode('utf-16'))
    with pytest.raises(ValueError, match='log.txt is a text in UTF-16: save it in UTF-8'):
        read_log(log)


def test_a_table_is_written_between_lines_of_windows_and_bytes_of_any_encoding(script, tmp_path):
    path = tmp_path / 'a.md'
    before = b'\xef\xbb\xbfcaf\xe9\r\n<!-- table1 -->\r\n', b'<!-- /table1 -->\r\n\xff\n'
    path.write_bytes(b'old'.join(before))
    assert script(reproduce, 'table1 --show --all --epochs 1 --markdown a.md')[0] == 0
    found = path.read_bytes()
    assert found.startswith(before[0]) and found.endswith(before[1])
    assert found.count(b'\n') == found.count(b'\r\n') + 1 > 9


def test_every_text_that_is_read_or_written_names_its_encoding():
    """Otherwise it would be the machine's encoding."""
    for path in [
        p
        for folder in ('.', 'engine', 'formats', 'images', 'benchmarks', 'examples')
        for p in (ROOT / folder).glob('*.py')
    ]:
        for call in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if not isinstance(call, ast.Call):
                continue
            keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
            assert 'text' not in keywords and 'universal_newlines' not in keywords, (path, call.lineno)
            if getattr(call.func, 'id', '') == 'open' or getattr(call.func, 'attr', '') in ('read_text', 'write_text'):
                mode = keywords.get('mode') or (ast.unparse(call.args[1]) if len(call.args) > 1 else '')
                assert 'b' in mode or 'encoding' in keywords, (path, call.lineno)
