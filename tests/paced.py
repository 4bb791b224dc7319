"""A training script for tests that kill or stop it: the run waits at the end of each epoch for a line on its stdin.

    PACED=cifar python paced.py FLAGS

The end of the stdin lets it go on freely. With SLOW_END, worker 1 takes so many seconds to end. With PAUSED, which is
TrainBatches or TestBatches, each worker waits after its first batch of photographs until the folder has a file GO.
"""

import atexit
import importlib
import os
import sys
import time

import ending
import engine
import imagefolder
import workers

say = engine.say


def say_and_wait(*words):
    say(*words)
    if workers.rank() == 0 and str(words[0]).startswith('epoch '):
        print(f'CUDA_VISIBLE_DEVICES={os.environ.get("CUDA_VISIBLE_DEVICES")}', flush=True)
        sys.stdin.readline()


def pause(batches):
    """Let a class of batches wait after the first."""
    iterate = batches.__iter__

    def waiting(self):
        for i, batch in enumerate(iterate(self)):
            yield batch
            if i == 0:
                os.write(1, b'paused\n')  # at once, or those of two workers mix
                while not os.path.exists('GO'):
                    time.sleep(0.01)

    batches.__iter__ = waiting


if __name__ == '__main__':
    engine.say = say_and_wait
    if 'PAUSED' in os.environ:
        pause(getattr(imagefolder, os.environ['PAUSED']))
    if workers.rank() == 1:
        atexit.register(time.sleep, float(os.environ.get('SLOW_END', 0)))
    ending.run(importlib.import_module(os.environ['PACED']).main)
