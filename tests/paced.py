"""A training script for tests that kill or stop it: the run waits at the end of each epoch for a line on its stdin.

    PACED=cifar python paced.py FLAGS

The end of the stdin lets it go on freely. With SLOW_END, worker 1 takes so many seconds to end.
"""

import atexit
import importlib
import os
import sys
import time

import ending
import engine
import workers

say = engine.say


def say_and_wait(*words):
    say(*words)
    if workers.rank() == 0 and str(words[0]).startswith('epoch '):
        sys.stdin.readline()


if __name__ == '__main__':
    engine.say = say_and_wait
    if workers.rank() == 1:
        atexit.register(time.sleep, float(os.environ.get('SLOW_END', 0)))
    ending.run(importlib.import_module(os.environ['PACED']).main)
