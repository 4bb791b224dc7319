"""Runs several commands at a time, and stops them when this process is asked to stop."""

import os
import signal
import subprocess
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

import torch

RUNNING = []  # the processes that run now
STOPPED = []  # the stop signals received


def call(command, job, jobs):
    """Run a command to its end; with several jobs, without its output and on the GPU of its job number, if any.

    Raises ValueError with its last line of error output if it fails, and KeyboardInterrupt if it was stopped.
    """
    environment = {**os.environ, 'AT_PARENT': str(os.getpid())}
    if jobs > 1:
        environment.setdefault('OMP_NUM_THREADS', str(max(1, os.cpu_count() // jobs)))
        if torch.cuda.is_available():
            command = [*command, '--gpu_id', str(job % torch.cuda.device_count())]
    text = {'encoding': 'utf-8', 'errors': 'replace'}
    pipes = {} if jobs == 1 else {'stdout': subprocess.DEVNULL, 'stderr': subprocess.PIPE, **text}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        RUNNING.append(process)
        if STOPPED:
            process.terminate()  # `stop` was called before this process was in RUNNING
        _, error = process.communicate()
        RUNNING.remove(process)
    if process.returncode in (130, 143, -signal.SIGINT, -signal.SIGTERM):
        raise KeyboardInterrupt
    if process.returncode:
        reason = (error or '').strip().splitlines()[-1:]
        raise ValueError(': '.join([f'exit status {process.returncode}', *reason]))


def run_all(waits_for, run, jobs):
    """Call run(name, job) -> outcome for each name, `jobs` at a time, in order, but each after the one it waits for.

    waits_for: {name: name that has to end first, or None}. Prints the outcomes and returns the names whose run raised
    OSError or ValueError. Raises KeyboardInterrupt if one was stopped.
    """
    title = {name: f'[{number}/{len(waits_for)}] {name}' for number, name in enumerate(waits_for, 1)}
    waiting, free, running, failed = list(waits_for), list(range(jobs)), {}, []
    pool = ThreadPoolExecutor(jobs)
    STOPPED.clear()
    handlers = {signum: signal.signal(signum, stop) for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    try:
        while waiting or running:
            unready = {*waiting, *(name for name, _ in running.values())}
            ready = [name for name in waiting if waits_for[name] not in unready]
            for name in ready[: len(free)]:
                waiting.remove(name)
                print(title[name], flush=True)
                job = free.pop(0)
                running[pool.submit(run, name, job)] = name, job
            # Without a timeout, a signal that arrives just before the wait would only be handled at its end.
            for future in wait(running, timeout=1, return_when=FIRST_COMPLETED).done:
                name, job = running.pop(future)
                free.append(job)
                try:
                    outcome = future.result()
                except (OSError, ValueError) as error:
                    failed.append(name)
                    outcome = f'failed: {error}'
                print(f'{title[name]}: {outcome}', flush=True)
    finally:
        pool.shutdown(cancel_futures=True)
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
    return failed


def stop(signum, _):
    """Ask the running commands to save and end; otherwise they would go on and keep their folders locked."""
    STOPPED.append(signum)
    for process in list(RUNNING):
        process.terminate()
