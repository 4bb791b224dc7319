"""The processes that a run starts import nothing from the current folder."""

import importlib.metadata
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from conftest import HANGS, refused

from images import children

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(children.__file__)))
PLANTED = """
import os
open({marks!r} + '/' + __name__ + '-' + str(os.getpid()), 'w').close()
raise SystemExit('a file of the current folder was executed')
"""


def plant(folder, marks):
    """Write a Python file for every name that a process could import; if executed, it leaves a mark."""
    marks.mkdir()
    installed = importlib.metadata.packages_distributions()
    ours = {path.stem for path in pathlib.Path(ROOT).glob('*.py')}
    ours |= {path.parent.name for path in pathlib.Path(ROOT).glob('*/__init__.py')}
    for name in filter(
        str.isidentifier, {*sys.stdlib_module_names, *installed, *ours, 'sitecustomize', 'usercustomize'}
    ):
        (folder / f'{name}.py').write_text(PLANTED.format(marks=str(marks)))


LONG = pytest.mark.skipif(not os.environ.get('AT_LONG_TESTS'), reason='takes long')


@pytest.mark.parametrize(
    'command',
    [
        'imagenet.py --imagenetpath . --image_size 32 --width 0.0625 --batch_size 4 --nthread 1 --ngpu 2',
        'cifar.py --dataset digits --image_size 8 --randomcrop_pad 1 --depth 10 --width 0.25 --compile',
        'reproduce.py demo --methods student --holdout 936 --seeds 2',
        pytest.param('benchmarks/step.py --only student --pairs 1 --dtype float --eager', marks=LONG),
    ],
)
def test_nothing_in_the_current_folder_is_executed(folder, tmp_path, command):
    """Not by any process: launcher, workers, loaders, runs of a table, benchmarks."""
    here = tmp_path / 'here'
    shutil.copytree(os.path.dirname(os.path.dirname(os.path.dirname(folder.train.paths[0]))), here)
    plant(here, tmp_path / 'marks')
    script, *words = command.split()
    environment = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | {'OMP_NUM_THREADS': '1'}
    words += [] if 'benchmarks' in script else ['--epochs', '1']
    done = subprocess.run(
        [sys.executable, os.path.join(ROOT, script), *words],
        **{'cwd': here, 'env': environment, 'capture_output': True, 'text': True, 'timeout': HANGS},
    )
    assert done.returncode == 0, done.stderr
    assert not os.listdir(tmp_path / 'marks') and 'Error' not in done.stderr


def test_an_environment_that_cannot_keep_the_current_folder_out_is_refused(monkeypatch):
    """With -E, Python ignores environment variables; a colon in a folder's name would split it."""
    script = os.path.join(ROOT, 'cifar.py')
    done = subprocess.run([sys.executable, '-E', script, '--epochs', '1'], capture_output=True, text=True)
    assert refused((done.returncode, done.stdout, done.stderr), 'python -E', 'leave -E out')
    monkeypatch.setattr(sys, 'path', [*sys.path, '/a:b'])
    with pytest.raises(ValueError, match='/a:b has a : in its name'):
        children.import_safely()
