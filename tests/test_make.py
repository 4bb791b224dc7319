"""`make venv` and `make clean`, with a fake Python and pip that only record their arguments."""

import os
import pathlib
import shutil
import subprocess

import pytest
import torch
from conftest import HANGS

ROOT = pathlib.Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(not shutil.which('make'), reason='needs make')

# The Python of a virtual environment: it records `-m pip ...`; a file `fails` makes it fail, `killed` kills make.
PYTHON = """#!/bin/sh
[ "$3" = --version ] && exec test -e .venv/pip-there
echo "$*" >> told
case "$*" in
  *ensurepip*) touch .venv/pip-there ;;
  *" -r "*) [ ! -e fails ] || exit 1; [ ! -e killed ] || kill -9 $PPID ;;
esac
"""
# The system's Python: `-m venv FOLDER` makes such an environment, also in an existing folder, like the real one.
SYSTEM = """#!/bin/sh
echo "system $*" >> told
[ ! -e stopped ] || exit 1
mkdir -p $3/bin && cp environment $3/bin/python && touch $3/pip-there
"""
INSTALLS = [
    '-m pip --disable-pip-version-check --quiet install --no-build-isolation setuptools<81 wheel',
    '-m pip --disable-pip-version-check --quiet install --no-build-isolation -r requirements.txt',
]
AGAIN = INSTALLS[1].replace('-r', '--ignore-installed -r')


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Run make in an empty folder: make('venv') -> (whether it succeeded, stderr, Python's command lines)."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / 'Makefile', 'Makefile')
    for name, text in (('environment', PYTHON), ('system', SYSTEM), ('requirements.txt', 'a==1\n')):
        pathlib.Path(name).write_text(text)
        pathlib.Path(name).chmod(0o755)
    pathlib.Path('requirements-dev.txt').write_text('-r requirements.txt\nb==1\n')

    def run(*words):
        told = pathlib.Path('told')
        told.write_text('')
        environment = {k: v for k, v in os.environ.items() if not k.startswith('MAKE') and k != 'MFLAGS'}
        command = ['make', 'PYTHON=./system', *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGS)
        return done.returncode == 0, done.stderr, told.read_text().splitlines()

    return run


def foreign(pip=True):
    """Create an environment that make has not made."""
    os.makedirs('.venv/bin')
    shutil.copy('environment', '.venv/bin/python')
    pathlib.Path('.venv/precious').touch()
    if pip:
        pathlib.Path('.venv/pip-there').touch()


def test_every_test_begins_with_the_same_random_numbers():
    assert torch.initial_seed() == 0


def test_an_environment_is_made_once_and_removed_by_clean(make):
    assert make('venv') == (True, '', ['system -m venv .venv', *INSTALLS])
    assert make('venv') == (True, '', [])
    assert make('venv-dev')[2] == [INSTALLS[1].replace('.txt', '-dev.txt')]
    assert make('venv-dev') == (True, '', [])
    assert make('clean')[0] and not os.path.exists('.venv')


def test_builds_for_cpus_come_from_an_index_of_pytorch(make):
    from_index = [
        line.replace('isolation ', 'isolation --extra-index-url https://download.pytorch.org/whl/cpu ')
        for line in INSTALLS
    ]
    assert make('venv', 'CPU=1') == (True, '', ['system -m venv .venv', *from_index])
    assert make('venv', 'CPU=1') == make('venv') == (True, '', [])


def test_an_environment_that_is_there_is_installed_into_and_never_removed(make):
    foreign()
    assert make('venv') == (True, '', INSTALLS)
    assert make('venv') == (True, '', [])
    assert make('clean')[0] and os.path.exists('.venv/precious')


def test_one_without_pip_gets_it_first(make):
    foreign(pip=False)
    assert make('venv') == (True, '', ['-m ensurepip', *INSTALLS])


def test_a_link_to_an_environment_is_kept_and_what_it_leads_to(make):
    foreign()
    os.rename('.venv', 'elsewhere')
    pathlib.Path('elsewhere/made-by-make').touch()
    os.symlink('elsewhere', '.venv')
    assert make('venv') == (True, '', INSTALLS)
    assert make('clean')[0] and os.path.islink('.venv') and os.path.exists('elsewhere/precious')


def test_what_is_no_environment_is_refused_in_one_line_and_kept(make):
    os.makedirs('.venv')
    pathlib.Path('.venv/precious').touch()
    for words in ('venv', 'clean', 'venv'):
        succeeded, err, told = make(words)
        assert told == [] and os.path.exists('.venv/precious')
        assert succeeded == (words == 'clean')
    assert err.startswith('.venv is no virtual environment, it has no bin/python: move it away\nmake: ***')


def test_other_content_is_installed_and_a_later_time_is_not(make):
    make('venv-dev')
    for name in ('requirements.txt', 'requirements-dev.txt'):
        os.utime(name, (2**32, 2**32))
    assert make('venv-dev') == (True, '', [])
    pathlib.Path('requirements.txt').write_text('a==2\n')
    os.utime('requirements.txt', (0, 0))
    assert make('venv-dev') == (True, '', INSTALLS)
    pathlib.Path('requirements-dev.txt').write_text('b==2\n')
    assert make('venv-dev') == (True, '', [INSTALLS[1].replace('.txt', '-dev.txt')])


@pytest.mark.parametrize('theirs', [False, True])
@pytest.mark.parametrize('how', ['fails', 'killed'])
def test_an_interrupted_installation_starts_again_with_every_package(make, theirs, how):
    if theirs:
        foreign()
    pathlib.Path(how).touch()
    assert not make('venv')[0]
    os.unlink(how)
    assert make('venv') == (True, '', [INSTALLS[0], AGAIN])
    assert make('venv') == (True, '', [])
    assert os.path.exists('.venv/precious') == theirs


def test_an_environment_whose_making_was_interrupted_is_made_again(make):
    pathlib.Path('stopped').touch()
    assert not make('venv')[0]
    os.unlink('stopped')
    assert make('venv') == (True, '', ['system -m venv .venv', *INSTALLS])
