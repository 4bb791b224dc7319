"""Losses and accuracy of a training epoch, over all workers."""

import math
import time

import torch
import torch.distributed as dist
from torchnet.meter import AverageValueMeter, ClassErrorMeter

from engine.workers import sum_over_workers, world

CALMER = 'try a lower --lr or --beta, or --dtype float'


class Meters:
    """Losses and accuracy of a training epoch; they stay on the device until `flush`."""

    def __init__(self, device, topk):
        self.device, self.topk = device, topk
        self.reset()

    def reset(self):
        self.values = {}
        self.errors = ClassErrorMeter(list(self.topk), accuracy=True)
        self.images = self.steps = self.bad = self.seconds = 0
        self.pending = []
        self.since = time.perf_counter()  # unlike the clock of TimeMeter, it never goes backwards

    def state(self, bad):
        """What all workers and what this one measured, as numbers; call `flush` first. bad: its unreadable images."""
        values = {name: {k: float(v) for k, v in vars(meter).items()} for name, meter in self.values.items()}
        errors = {'n': self.errors.n, 'sum': {int(k): int(n) for k, n in self.errors.sum.items()}}
        mine = {'errors': errors, 'bad': self.bad + bad}
        return {'steps': self.steps, 'images': self.images, 'seconds': self.elapsed(), 'values': values}, mine

    def restore(self, shared, mine):
        """Continue from what `state` returned."""
        self.steps, self.images, self.seconds = shared['steps'], shared['images'], shared['seconds']
        for name, value in shared['values'].items():
            vars(self.values.setdefault(name, AverageValueMeter())).update(value)
        self.errors.n, self.errors.sum = mine['errors']['n'], dict(mine['errors']['sum'])
        self.bad = mine['bad']

    def elapsed(self):
        return self.seconds + time.perf_counter() - self.since

    def add(self, terms, logits, labels, size):
        """Add a step of this worker; summed over workers, terms are means over the global batch of `size` images."""
        self.names = list(terms)
        self.pending.append((torch.stack([t.detach() for t in terms.values()]), logits.detach(), labels))
        self.images += size

    def flush(self, epoch):
        """Add the pending steps to the meters. Raises FloatingPointError at the first step whose loss is not finite."""
        if not self.pending:
            return
        rows, logits, labels = zip(*self.pending)
        rows = torch.stack(rows)
        if world() > 1:  # added in the order of workers, however many steps are pending
            rows_of = [torch.empty_like(rows) for _ in range(world())]
            dist.all_gather(rows_of, rows)
            rows = sum(rows_of)
        self.errors.add(torch.cat(logits).float(), torch.cat(labels))
        for row in rows.tolist():
            self.steps += 1
            terms = dict(zip(self.names, row))
            if not all(map(math.isfinite, row)):
                losses = ', '.join(f'{k} {v:.4g}' for k, v in terms.items())
                raise FloatingPointError(
                    f'epoch {epoch}, step {self.steps}: the loss is not finite ({losses}); {CALMER}'
                )
            for name, value in terms.items():
                self.values.setdefault(name, AverageValueMeter()).add(value)
        self.pending = []

    def accuracy(self):
        n, *wrong = sum_over_workers([self.errors.n, *(self.errors.sum[k] for k in self.topk)], self.device)
        return [100 * (1 - w / n) for w in wrong]
