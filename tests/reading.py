"""What loader processes do in tests, in a file that they import at once."""

import errno
import os

import cv2
import torch


def threads(given, task, out):
    return torch.from_numpy(out[:1]), cv2.getNumThreads(), torch.get_num_threads()


def filled(given, task, out):
    """Fill rows for a task (number, images): as many rows as images, of that number; 9 is a fault, 8 the machine's."""
    number, count = task
    if number == 8:
        raise OSError(errno.EMFILE, 'too many open files', 'a.jpg')
    if number == 9:
        raise KeyError('no such thing')
    out[:count] = number
    return torch.from_numpy(out[:count]), number, os.getpid()


def where(given, task, out):
    return torch.from_numpy(out[:1]), os.getcwd()


def memory(dataset, task, out):
    """The last name and label after all have been read, and this process's own memory without mapped files, in MB.

    Pages of a mapped file count as private while no other process has read them.
    """
    for name, label in zip(dataset.train.paths, dataset.train.labels):  # noqa: B007
        pass
    private, of_file = 0, False
    with open('/proc/self/smaps', encoding='utf-8', errors='replace') as file:
        for line in file:
            first, *words = line.split()
            if not first.endswith(':'):  # the start of a mapping: addresses, rights, offset, device, inode, name
                of_file = words[4:] != [] and words[4].startswith('/')
            elif first.startswith('Private_') and not of_file:
                private += int(words[0])
    return torch.from_numpy(out[:1]), (name, int(label)), private / 1000
