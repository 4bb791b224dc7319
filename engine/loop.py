"""The training loop: torchnet's Engine, and one class whose on_* methods are its hooks.

Everything that is logged or learnt is a function of the global batch and does not depend on the number of workers,
except batch norm: without --sync_bn, each worker uses the statistics of its own share.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torchnet.engine import Engine
from tqdm import tqdm

from engine import events, log, runs, workers
from engine.arguments import listed
from engine.evaluate import evaluate
from engine.meters import CALMER, Meters
from engine.precision import autocast, slow_in_16_bits
from engine.resume import resume_, state_of, statistics, trained
from engine.schedules import lr_at
from engine.step import FLUSH, Updates, total_loss
from engine.stopping import Requests, Stopped
from engine.workers import join_statistics_, rank, say, sum_over_workers, world
from formats.write import save
from utils import DTYPES, num_parameters

HIGH_LOSS = 1000.0  # guessing among n classes gives ln(n)
# The flags that bear on a test; the tested network has a shape of its own.
OF_A_TEST = (
    *('evaluate', 'dataset', 'dataroot', 'imagenetpath', 'follow_links', 'holdout', 'image_size', 'skip_bad_images'),
    *('batch_size', 'dtype', 'deterministic', 'ngpu', 'gpu_id'),
)


class Data(NamedTuple):
    """The data that a network is trained and tested on."""

    train: Callable  # (epoch, start) -> batches (images (B, 3, H, W), labels (B,), size of the global batch)
    test: Callable  # () -> such batches
    counts: dict  # for the log: num_classes, classes (their names), train_images, test_images
    image: torch.Tensor  # an input of the training size, (1, 3, H, W)
    topk: tuple = (1,)

    @property
    def num_classes(self):
        return self.counts['num_classes']

    @property
    def device(self):
        return self.image.device


def count(dataset):
    """The classes and the numbers of images of a data set, for the log."""
    images = {'train_images': len(dataset.train.labels), 'test_images': len(dataset.test.labels)}
    return {'num_classes': dataset.num_classes, 'classes': list(dataset.classes), **images}


def start(opt):
    """Check --ngpu, --save and the files to read, start and join the workers; return this worker's torch.device.

    Raises ValueError for flags that this machine or --save does not allow, and OSError for a missing file.
    """
    workers.check(opt)
    runs.check_files(opt)
    with contextlib.redirect_stdout(None) if workers.launches(opt) else contextlib.nullcontext():
        if rank() == 0:
            runs.check_save(opt)  # the first worker prints its notes
    device = workers.join(opt)
    say(listed({name: value for name, value in vars(opt).items() if not opt.evaluate or name in OF_A_TEST}))
    if DTYPES[opt.dtype].itemsize == 2 and slow_in_16_bits(device):
        say(f'note: this CPU has no AVX-512, without which --dtype float is several times faster than {opt.dtype}')
    return device


def fit(opt, step, student, data):
    """Train for opt.epochs, keeping log and checkpoint in opt.save; return the last epoch's record, or None if
    all epochs were done.

    step: from `make_step`. student: the Network that is trained, evaluated and saved. Accuracies are logged as a
    number, or as a list if data.topk has several.
    Raises Stopped after a signal, FloatingPointError for a loss or parameter that is not finite, ValueError if
    another process trains into --save, and OSError if it cannot be written.
    """
    with runs.locked(opt.save), Requests() as requests, contextlib.ExitStack() as stack:
        updates = Updates(opt, trained(student.params).values(), data.device)
        done, progress = resume_(opt, student.params, updates, data)
        if done >= opt.epochs:
            return say(f'nothing to do: {done} of {opt.epochs} epochs are done')
        late = [epoch for epoch in json.loads(opt.epoch_step) if epoch > opt.epochs]
        if late:
            say(f'note: --epochs {opt.epochs} ends before the learning rate drops at {late} (--epoch_step)')
        runs.open_run(opt, done)
        note = stack.enter_context(events.writer(opt, done))
        run = Run(opt, step, student, data, updates, requests, done, progress, note)
        engine = Engine()
        engine.hooks = {name: getattr(run, name) for name in dir(run) if name.startswith('on_')}
        engine.train(run.loss, None, opt.epochs, updates)
    if opt.save:
        say(f'log: {os.path.join(opt.save, "log.txt")}\nmodel: {os.path.join(opt.save, "model.pt7")}')
    return run.record


class Run:
    """The state of a training run, and the hooks (on_*) that torchnet's Engine calls."""

    def __init__(self, opt, step, student, data, updates, requests, done, progress, note):
        self.opt, self.step, self.student, self.data, self.updates = opt, step, student, data, updates
        self.requests, self.epoch, self.progress, self.note = requests, done, progress, note
        self.meters = Meters(data.device, data.topk)
        self.facts = {**vars(opt), **data.counts, 'n_parameters': num_parameters(student.params)}
        self.facts |= log.environment(data.device)
        self.record = self.batches = self.images = None  # images: the batch of the last step
        self.saved_at, self.warned = time.monotonic(), False

    def loss(self, sample):
        """The loss that the Engine differentiates, and the logits."""
        return self.updates.scaled(*total_loss(self.opt, self.step, sample, self.epoch, self.meters))

    def on_start(self, state):
        state['epoch'] = self.epoch

    def on_start_epoch(self, state):
        progress, self.progress, self.epoch = self.progress, None, state['epoch'] + 1
        self.meters.reset()
        if progress:
            self.meters.restore(progress, progress['workers'][rank()])
        _set_rate_(self.opt, self.updates.optimizer, self.epoch, begins=not progress)
        done = self.meters.steps
        self.batches = self.data.train(self.epoch, done)
        name, total = f'epoch {self.epoch}/{self.opt.epochs}', done + len(self.batches)
        state['iterator'] = state['bar'] = _bar(self.read(), name, done, total)

    def read(self):
        with self.keeping():
            yield from self.batches

    @contextlib.contextmanager
    def keeping(self):
        """While images are read: if that fails, a single worker saves the steps before. Several could only together."""
        try:
            yield
        except (OSError, ValueError, MemoryError, RuntimeError):
            if world() == 1:
                self.meters.flush(self.epoch)
                if self.meters.steps:
                    self.keep_progress()
                    say(self.where())
            raise

    def on_update(self, state):
        self.images = state['sample'][0]
        if len(self.meters.pending) == FLUSH:
            self.meters.flush(self.epoch)
            speed = self.meters.images / self.meters.elapsed()
            state['bar'].set_postfix_str(f'loss {self.meters.values["loss"].value()[0]:.4f}, {speed:.0f} images/s')
            self.pause()
        elif self.requests.signum:
            self.pause(alone=True)

    def on_end_epoch(self, state):
        self.meters.flush(self.epoch)
        self.pause()
        trained_for = self.meters.elapsed()
        join_statistics_(self.student.params)
        since, batches = time.perf_counter(), self.data.test()
        settings = self.data.device, self.opt.dtype, self.data.topk
        with self.keeping():
            tested = evaluate(self.student, batches, *settings, lambda: self.pause(alone=True))
        if not math.isfinite(tested[0]):
            raise FloatingPointError(f'epoch {self.epoch}: the test loss is not finite ({tested[0]}); {CALMER}')
        tested_for = time.perf_counter() - since
        results = log.results(self.opt, self.epoch, self.meters, trained_for, tested, tested_for)
        if hasattr(batches, 'bad'):
            bad = self.meters.bad + self.batches.bad + batches.bad
            results['bad_images'] = int(sum_over_workers([bad], self.data.device)[0])
        self.record = {**self.facts, **results}
        self.keep_epoch()
        self.note(results)  # for TensorBoard
        _print_epoch(self.opt, self.record, self.meters)
        if tested[0] > HIGH_LOSS and not self.warned:
            say(f'note: a test loss of {tested[0]:.3g} is far above that of guessing: the run may diverge; {CALMER}')
            self.warned = True

    def pause(self, alone=False):
        """Save if it is time, stop after a signal: all workers together. With `alone`, several workers do nothing."""
        due = 0 < self.opt.save_every * 60 < time.monotonic() - self.saved_at
        reasons = [self.requests.signum, int(due)]
        if world() > 1:
            if alone:
                return
            reasons = torch.tensor(reasons, device=self.data.device)
            dist.all_reduce(reasons, dist.ReduceOp.MAX)
            reasons = reasons.tolist()
        signum, due = reasons
        if signum or due:
            self.meters.flush(self.epoch)
            self.keep_progress()
        if signum:
            raise Stopped(signum, self.where())

    def where(self):
        """Where the run stopped, and how to continue."""
        advice = 'go on with --resume auto' if self.opt.save else 'nothing is kept without --save'
        return f'stopped after step {self.meters.steps} of epoch {self.epoch}; {advice}'

    def keep_progress(self):
        """Save in the middle of an epoch, with the progress of every worker."""
        self.check_finite()
        shared, mine = self.meters.state(getattr(self.batches, 'bad', 0))
        per_worker = [mine]
        if world() > 1:
            mine['statistics'] = {k: v.cpu() for k, v in statistics(self.student.params).items()}
            per_worker = [None] * world()
            dist.all_gather_object(per_worker, mine)
        images, settings = self.data.counts['train_images'], runs.settings({**vars(self.opt), 'lr_now': self.opt.lr})
        batches = {'batch_size': self.opt.batch_size, 'seed': self.opt.seed}
        batches |= {'train_images': images, 'settings': settings}
        self.save({**shared, **batches, 'workers': per_worker}, self.epoch - 1)

    def keep_epoch(self):
        """Append the log line, then replace the checkpoint: a resume after a kill in between repeats the epoch."""
        self.check_finite()
        if self.opt.save and rank() == 0:
            log.append_line(os.path.join(self.opt.save, 'log.txt'), log.line_of(self.record))
        self.save(None, self.epoch)

    def save(self, progress, epochs):
        """Replace the checkpoint; call `check_finite` first."""
        self.saved_at = time.monotonic()
        if self.opt.save and not rank():
            state = state_of(self.student.params, self.updates, epochs, progress, self.data)
            save(os.path.join(self.opt.save, 'model.pt7'), state)

    def check_finite(self):
        """Raise FloatingPointError in all workers if the last updates made something infinite or NaN in any of them."""
        self.updates.check_scale(self.epoch)
        spoilt = [self.spoilt()]
        if world() > 1:
            spoilt = [None] * world()
            dist.all_gather_object(spoilt, self.spoilt())
        if any(spoilt):
            what = next(filter(None, spoilt))
            raise FloatingPointError(
                f'epoch {self.epoch}, step {self.meters.steps}: {what} became infinite or NaN; {CALMER}'
            )

    def spoilt(self):
        """The name of what is not finite in this worker's parameters, optimizer and logits; '' if nothing is."""
        f, params = self.student
        values = {name: value.detach() for name, value in params.items()}
        for name, param in trained(params).items():
            state = self.updates.optimizer.state.get(param, {})
            tensors = {key: value for key, value in state.items() if getattr(value, 'shape', None) == param.shape}
            values |= {f'the {key} of {name}': value for key, value in tensors.items()}
        finite = torch.stack([v.isfinite().all() for v in values.values()]).tolist()
        wrong = [k for k, good in zip(values, finite) if not good]
        if wrong:
            return wrong[0] + (f' and {len(wrong) - 1} others' if len(wrong) > 1 else '')
        if self.images is None:
            return ''
        with torch.no_grad(), autocast(self.data.device, self.opt.dtype):
            logits = f(self.images, params, False)[0]
        return '' if logits.isfinite().all() else 'the output of the network'


def _bar(batches, name, start, total):
    """A progress bar over the remaining batches, shown by the first worker on a terminal."""
    return tqdm(batches, name, total, initial=start, unit='step', leave=False, disable=True if rank() else None)


def _set_rate_(opt, optimizer, epoch, begins=True):
    """Set an epoch's learning rate; where it drops, the optimizer starts anew, unless --keep_momentum is given."""
    epoch_step = json.loads(opt.epoch_step)
    for group in optimizer.param_groups:
        group['lr'] = lr_at(epoch, opt.lr, epoch_step, opt.lr_decay_ratio)
    if begins and epoch in epoch_step and not opt.keep_momentum:
        optimizer.state.clear()


def _percent(accuracy):
    return ' '.join(f'{a:.2f}%' for a in (accuracy if isinstance(accuracy, list) else [accuracy]))


def _print_epoch(opt, record, meters):
    terms = '  '.join(f'{k} {record[k]:.3g}' for k in meters.values if k != 'loss')
    say(
        f'epoch {record["epoch"]}/{opt.epochs}  lr {record["lr_now"]:.3g}  '
        f'train loss {record["train_loss"]:.4f} acc {_percent(record["train_acc"])}  '
        f'test loss {record["test_loss"]:.4f} acc {_percent(record["test_acc"])}  {terms}  '
        f'{record["images_per_second"]:.0f} images/s  '
        f'{record["train_time"]:.0f} s, tested in {record["test_time"]:.0f} s'
    )
