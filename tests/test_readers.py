"""Loader processes: whole batches in order, and an end in one line when any process dies."""

import errno
import os
import signal
import subprocess
import sys

import cv2
import paced
import pytest
import reading
from conftest import HANGS, ends, proc, refused, state, write_photographs

from images import readers
from images.shared import share

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(readers.__file__)))
NOTHING = share(None)


def test_a_loader_process_decodes_on_one_thread():
    cv2.setNumThreads(2)
    try:
        found = [more for _, *more in readers.read_ahead(reading.threads, NOTHING, [0, 1], (1, 1, 1, 3), 1)]
    finally:
        cv2.setNumThreads(0)
    assert found == [[1, 1]] * 2


@pytest.mark.parametrize('number', [1, 2, 3, 8])
def test_batches_come_whole_and_in_order_from_any_number_of_processes(number):
    tasks, processes = [(i, i % 3) for i in range(7)], set()
    batches = readers.read_ahead(reading.filled, NOTHING, tasks, (2, 4, 4, 3), number)
    for task, (rows, found, pid) in zip(tasks, batches, strict=True):
        processes.add(pid)
        assert task == (found, len(rows)) and (rows == found).all()
    assert len(processes) == min(number, 7)


def processes_of(rounds, number=2, shape=(2, 4, 4, 3)):
    """The processes that read so many batches."""
    return {pid for _, _, pid in readers.read_ahead(reading.filled, NOTHING, [(1, 1)] * rounds, shape, number)}


def test_processes_are_kept_for_the_next_batches_of_any_shape_unless_these_end_early_or_they_die():
    first = processes_of(4)
    assert processes_of(5, shape=(3, 2, 2, 3)) == first and processes_of(1, number=1) < first
    batches = readers.read_ahead(reading.filled, NOTHING, [(1, 1)] * 9, (2, 4, 4, 3), 2)
    assert next(batches)[2] in first
    other = processes_of(4)
    assert len(other) == 2 and not other & first  # while those are not done
    batches.close()
    assert ends(first) and processes_of(4) == other
    for _ in range(5):  # also while it is still ending
        other = processes_of(4)
        os.kill(min(other), signal.SIGKILL)
        assert processes_of(4) & other == {max(other)}


def test_names_are_relative_to_the_folder_where_reading_begins(tmp_path, monkeypatch):
    for name in ('a', 'b'):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        assert [found for _, found in readers.read_ahead(reading.where, NOTHING, [0], (1, 1, 1, 3), 1)] == [os.getcwd()]


def test_a_fault_in_a_loader_process_is_raised_with_its_traceback():
    with pytest.raises(RuntimeError, match="KeyError: 'no such thing'"):
        list(readers.read_ahead(reading.filled, NOTHING, [(1, 1), (9, 1)], (2, 4, 4, 3), 2))


def test_a_failure_of_the_machine_in_a_loader_process_is_raised_as_it_is():
    with pytest.raises(OSError, match="too many open files: 'a.jpg'") as caught:
        list(readers.read_ahead(reading.filled, NOTHING, [(1, 1), (8, 1)], (2, 4, 4, 3), 2))
    assert caught.value.errno == errno.EMFILE


needs_proc = pytest.mark.skipif(not os.path.exists('/proc/self/stat'), reason='finds processes in /proc')


@needs_proc
@pytest.mark.parametrize('victim', ['first', 'second', 'server'])
def test_a_dead_loader_process_ends_the_reading_at_once_and_the_others_with_it(victim):
    """Whichever of them dies, or the server that they were forked from."""
    batches = readers.read_ahead(reading.filled, NOTHING, [(i % 8, 1) for i in range(100)], (2, 4, 4, 3), 2)
    pids = [next(batches)[2] for _ in range(4)][:2]
    killed = {'first': pids[0], 'second': pids[1], 'server': state(pids[0])[1]}[victim]
    os.kill(killed, signal.SIGKILL)
    assert ends([killed])
    with pytest.raises(ChildProcessError, match='a process that reads images died'):
        list(batches)
    assert ends(pids)


def descendants(pid):
    """The processes that a process has started, and those that they have started."""
    parents = {int(name): state(name)[1] for name in os.listdir('/proc') if name.isdigit()}
    tree = [pid]
    for parent in tree:
        tree += [child for child, its in parents.items() if its == parent]
    return tree[1:]


def is_loader(pid):
    """Whether a process was forked by the fork server, and is not the server."""
    return all('forkserver' in proc(p, 'cmdline') for p in (pid, state(pid)[1]))


IMAGES = '--image_size 32 --width 0.0625 --epochs 1 --batch_size 4 --nthread 2 --epoch_step [] --imagenetpath'


@needs_proc
@pytest.mark.parametrize(
    'ngpu, paused, victim',
    [
        (1, 'TrainBatches', 'loader'),
        (1, 'TrainBatches', 'main'),
        (2, 'TestBatches', 'loader'),
        (2, 'TrainBatches', 'main'),
    ],
)
def test_the_death_of_any_process_of_a_run_ends_all_of_them_with_one_line(tmp_path, ngpu, paused, victim):
    """A loader that the system kills for lack of memory, or the main process, be it trainer or launcher."""
    root = str(write_photographs(tmp_path / 'photos', train=24, test=24))  # more than loaders read ahead
    environment = {**os.environ, 'PYTHONPATH': ROOT, 'OMP_NUM_THREADS': '1', 'PACED': 'imagenet', 'PAUSED': paused}
    command = [
        sys.executable,
        paced.__file__,
        *IMAGES.split(),
        root,
        *'--image_size 33 --batch_size 2'.split(),
        '--ngpu',
        str(ngpu),
    ]
    pipes = dict.fromkeys(('stdout', 'stderr'), subprocess.PIPE)
    with subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes) as process:
        for _ in range(ngpu):
            assert 'paused\n' in iter(process.stdout.readline, '')
        others = descendants(process.pid)
        if victim == 'main':
            process.kill()
        else:
            os.kill(max(filter(is_loader, others)), signal.SIGKILL)
        (tmp_path / 'GO').touch()
        assert ends(others)
        _, err = process.communicate(timeout=HANGS)
    if victim == 'loader':
        assert process.returncode == 1 and err.count('\n') == 1, err
        assert 'error: a process that reads images died (signal 9)' in err and '--nthread' in err
    else:
        # Workers that first notice that their launcher's store is gone end without a message.
        assert err in ('', 'the process that started this run has died, so it ends\n'), err


LITTLE = 'umount /dev/shm; mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'


can_mount = subprocess.run(['unshare', '-m', 'sh', '-c', LITTLE, 'sh', 'true'], capture_output=True).returncode == 0


@pytest.mark.skipif(not can_mount, reason='needs the right to mount')
def test_a_full_dev_shm_is_no_hindrance(folder, tmp_path):
    """Containers often have 64 MB of it."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(folder.train.paths[0])))
    words = '--image_size 224 --batch_size 8 --skip_teacher_check'.split()
    command = [sys.executable, os.path.join(ROOT, 'imagenet.py'), *IMAGES.split(), root, *words]
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    little = ['unshare', '-m', 'sh', '-c', LITTLE, 'sh', *command]
    done = subprocess.run(little, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0 and 'epoch 1/1' in done.stdout, done.stderr


def test_a_folder_for_temporary_files_of_too_long_a_name_is_named(folder, tmp_path):
    root = os.path.dirname(os.path.dirname(os.path.dirname(folder.train.paths[0])))
    long = tmp_path / ('x' * 100)
    long.mkdir()
    command = [sys.executable, os.path.join(ROOT, 'imagenet.py'), *IMAGES.split(), root]
    environment = {**os.environ, 'TMPDIR': str(long)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=HANGS)
    assert refused((done.returncode, done.stdout, done.stderr), str(long), 'set a shorter TMPDIR')


READING = """
import sys
BEFORE = set(sys.modules)
import torch
def read(given, task, out):
    return torch.from_numpy(out[:1]), {'images.photographs', 'torch', 'cv2'} <= BEFORE
"""


def test_loader_processes_begin_with_everything_imported_and_do_not_run_the_script_again(tmp_path):
    """Otherwise each process would import for seconds, wherever the run is started."""
    script = (
        'import os, sys; sys.path = [os.environ["ROOT"], *sys.path]\n'
        'from images import readers, shared; import little\n'
        'print("the script runs")\n'
        'if __name__ == "__main__":\n'
        '    batches = readers.read_ahead(little.read, shared.share(None), [0, 1], (1, 1, 1, 3), 2)\n'
        '    print([found for _, found in batches])\n'
    )
    (tmp_path / 'script.py').write_text(script)
    (tmp_path / 'little.py').write_text(READING)
    environment = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | {'ROOT': ROOT}
    (tmp_path / 'elsewhere').mkdir()
    command = [sys.executable, '../script.py']
    out = subprocess.check_output(command, cwd=tmp_path / 'elsewhere', env=environment, text=True)
    assert out == 'the script runs\n[True, True]\n'
