"""A training script for tests that kill or stop it: the run waits at the end of each epoch for a line on its stdin.

    PACED=cifar python paced.py FLAGS

After the end of stdin it no longer waits.

SLOW_START: seconds that each worker waits before it starts. SLOW_END: seconds that worker 1 waits before it exits.
DIES_ONCE: a file that worker 1 creates at its first start, in which it kills itself. PAUSED: TrainBatches or
TestBatches; each worker waits after its first batch of photographs until the folder has a file GO. SPOIL: an epoch;
after its test the last worker sets a running variance to infinity.
"""

import atexit
import importlib
import os
import signal
import sys
import time

from engine import ending, loop, workers
from engine.workers import say
from images import photographs


def say_and_wait(*words):
    say(*words)
    if workers.rank() == 0 and str(words[0]).startswith('epoch '):
        print(f'CUDA_VISIBLE_DEVICES={os.environ.get("CUDA_VISIBLE_DEVICES")}', flush=True)
        sys.stdin.readline()


def pause(batches):
    """Make a class of batches wait after the first one."""
    iterate = batches.__iter__

    def waiting(self):
        for i, batch in enumerate(iterate(self)):
            yield batch
            if i == 0:
                os.write(1, b'paused\n')  # in one write, so that lines of two workers do not mix
                while not os.path.exists('GO'):
                    time.sleep(0.01)

    batches.__iter__ = waiting


def spoil(evaluate, epoch):
    """An `evaluate` that spoils the network at its `epoch`-th call."""
    times = []

    def spoiling(network, *more):
        found = evaluate(network, *more)
        times.append(1)
        if len(times) == epoch:
            network.params['bn.running_var'][0] = float('inf')
        return found

    return spoiling


if __name__ == '__main__':
    time.sleep(float(os.environ.get('SLOW_START', 0)))
    dies = os.environ.get('DIES_ONCE')
    if workers.rank() == 1 and dies and not os.path.exists(dies):
        open(dies, 'x').close()
        os.kill(os.getpid(), signal.SIGKILL)
    loop.say = say_and_wait
    if 'SPOIL' in os.environ and workers.rank() == workers.world() - 1:
        loop.evaluate = spoil(loop.evaluate, int(os.environ['SPOIL']))
    if 'PAUSED' in os.environ:
        pause(getattr(photographs, os.environ['PAUSED']))
    if workers.rank() == 1:
        atexit.register(time.sleep, float(os.environ.get('SLOW_END', 0)))
    ending.run(importlib.import_module(os.environ['PACED']).main)
