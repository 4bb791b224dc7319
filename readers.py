"""Processes that read images for the one that trains."""

import functools
import multiprocessing
import multiprocessing.forkserver

import children


@functools.cache
def context():
    """The multiprocessing context of loader processes: they are forked from a server without threads.

    Forked from this process, one sooner or later inherits a lock held by a thread (of autograd, of gloo) that it does
    not have, and waits for ever.
    """
    forkserver = multiprocessing.get_context('forkserver')
    forkserver.set_forkserver_preload(['__main__', 'imagefolder'])
    children.import_safely()
    multiprocessing.forkserver.ensure_running()
    return forkserver
