"""One worker of each machine lists the images; what it meets, all meet."""

import os
import subprocess
import sys
import threading

import pytest
from conftest import HANGS, refused
from test_workers import ENVIRONMENT

import imagenet
from engine import machine
from images.shared import share


@pytest.fixture
def together(monkeypatch):
    """Call f as several workers: together(f, the machine of each) -> [what f(rank) returns or raises].

    They are threads, which exchange values at a barrier.
    """
    own = threading.local()

    def run(f, machines):
        barrier, values, results = threading.Barrier(len(machines)), {}, {}

        def gathered(value):
            values[own.rank] = value
            barrier.wait(HANGS)
            found = [values[rank] for rank in range(len(machines))]
            barrier.wait(HANGS)
            return found

        def work(rank):
            own.rank = rank
            try:
                results[rank] = f(rank)
            except Exception as error:
                results[rank] = error

        monkeypatch.setattr(machine, '_place', lambda: machines[own.rank])
        monkeypatch.setattr(machine, 'rank', lambda: own.rank)
        monkeypatch.setattr(machine, 'world', lambda: len(machines))
        monkeypatch.setattr(machine, '_gathered', gathered)
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(machines))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(HANGS)
        return [results[rank] for rank in range(len(machines))]

    return run


@pytest.mark.parametrize('machines, listed_by', [('aabb', '0022'), ('abab', '0101'), ('abc', '012')])
def test_the_first_worker_of_each_machine_lists_for_all_of_that_machine(together, machines, listed_by):
    """However the ranks are spread over machines."""
    found = together(lambda rank: machine.shared_on_machine(lambda: share(f'list {rank}')), machines)
    assert [shared.value for shared in found] == [f'list {rank}' for rank in listed_by]


def test_a_worker_that_may_not_open_the_list_of_another_makes_its_own(together, monkeypatch):
    def forbidden(address):
        raise PermissionError(address[0])

    monkeypatch.setattr(machine.Shared, 'at', forbidden)
    found = together(lambda rank: machine.shared_on_machine(lambda: share(rank)), 'aab')
    assert [shared.value for shared in found] == [0, 1, 2]


def test_an_error_of_one_machine_is_raised_by_the_workers_of_all(together):
    def make(rank):
        if rank == 2:
            raise OSError('photos: no such folder')
        return share(rank)

    found = together(lambda rank: machine.shared_on_machine(lambda: make(rank)), 'aabb')
    assert all(isinstance(error, ValueError | OSError) for error in found)
    assert [str(error) for error in found] == [
        *['on the machine of worker 2: photos: no such folder'] * 2,
        *['photos: no such folder'] * 2,
    ]


def test_several_workers_end_with_the_one_line_of_the_one_that_lists(tmp_path):
    (tmp_path / 'train').mkdir()
    flags = '--imagenetpath . --image_size 32 --width 0.0625 --batch_size 8 --ngpu 2'
    command = [sys.executable, imagenet.__file__, *flags.split()]
    pipes = {'stdin': subprocess.DEVNULL, 'capture_output': True, 'text': True}
    done = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, timeout=HANGS, **pipes)
    found = done.returncode, done.stdout, done.stderr
    assert refused(found, f'.{os.sep}train has no folders of classes: expected train/<class>/*')


def test_workers_of_this_machine_are_of_one_place(monkeypatch):
    monkeypatch.setattr(machine, 'rank', lambda: 3)
    place = machine._place()
    assert place == machine._place() != 3
    monkeypatch.setattr(os, 'readlink', lambda path: open(''))  # no /proc
    assert machine._place() == 3
