"""One worker of each machine lists the images, and the others of that machine share what it has found."""

import os

import torch.distributed as dist

from engine.workers import rank, world
from images.shared import Shared


def shared_on_machine(make):
    """What make() returns, a `Shared`: only the first worker of each machine calls it.

    Its OSError or ValueError is raised by all workers, so that none waits for another.
    """
    if world() == 1:
        return make()
    place = _place()
    first, shared, found = _gathered(place).index(place), None, None
    if first == rank():
        try:
            shared = make()
            found = shared.address()
        except (OSError, ValueError) as error:
            found = error
    found = _gathered(found)
    errors = {worker: error for worker, error in enumerate(found) if isinstance(error, Exception)}
    if first in errors:
        raise errors[first]
    for worker, error in errors.items():
        raise ValueError(f'on the machine of worker {worker}: {error}')
    try:
        return shared or Shared.at(found[first])
    except OSError:  # a container may forbid processes to open each other's files
        return make()


def _place():
    """Equal for workers that have the same files and can open each other's; else each is alone at its place."""
    try:
        with open('/proc/sys/kernel/random/boot_id', encoding='ascii') as file:
            return file.read(), *(os.readlink(f'/proc/self/ns/{kind}') for kind in ('pid', 'mnt')), os.geteuid()
    except OSError:
        return rank()


def _gathered(value):
    """The values of all workers, in the order of their ranks."""
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values
