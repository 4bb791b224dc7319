"""Twenty steps of AT + KD in every mode, by any number of workers; writes losses and parameters to a file.

python twenty_steps.py OUT. Modes are fixed, sync or own batch norm statistics, and full-activation or gradient-based
transfer with the symmetry norm instead of AT, with fixed statistics. In the mode `own` a single worker takes each
batch in two shares, as two would.
"""

import argparse
import sys
from functools import partial

import torch
import torch.distributed as dist

import resnet
from engine import ending, workers
from engine.step import make_step
from engine.student import Network, pair
from images import memory

FLAGS = {
    **{'alpha': 0.7, 'beta': 100.0, 'temperature': 4.0, 'power': 2, 'mapping': 'sum', 'at_form': 'code'},
    **{'transfer': 'activation', 'penalty': 'none', 'gamma': 0, 'groups': '', 'batch_size': 32},
    **{'compile': False, 'cuda_graphs': False, 'verbose': False, 'teacher_dtype': 'same'},
}
MODES = {
    'fixed': (False, False, {}),
    'sync': (True, True, {}),
    'own': (True, False, {}),
    'full': (False, False, {'transfer': 'full', 'beta': 1000.0}),
    'gradient': (False, False, {'transfer': 'gradient', 'beta': 1.0, 'penalty': 'symmetry', 'gamma': 0.5}),
}


def steps(mode):
    """Losses and parameters after the steps of a mode."""
    training, sync_bn, more = MODES[mode]
    opt = argparse.Namespace(**{**FLAGS, **more}, dtype='double')
    torch.manual_seed(0)
    device = torch.device('cpu')
    f, params = resnet.wide_resnet(10, 0.25, 10)
    g, params_t = resnet.wide_resnet(10, 0.5, 10)
    params, params_t = ({k: v.detach().double() for k, v in p.items()} for p in (params, params_t))
    for key, value in params.items():
        value.requires_grad_('running' not in key)
    teacher = partial(g, params=params_t, mode=False)
    f = pair(opt, Network(f, params), teacher, torch.zeros(1, 3, 8, 8, dtype=torch.double))
    step = make_step(opt, workers.data_parallel(f, params, training, sync_bn), teacher, device)
    optimizer = torch.optim.SGD([v for v in params.values() if v.requires_grad], 0.002, 0.9, weight_decay=5e-4)
    digits = memory.load('digits', image_size=8).train
    images = memory.Images(digits.pixels[:150], digits.labels[:150])  # the last batch of an epoch has 22 images
    losses = []
    for epoch in range(1, 5):
        shares = [(0, 2), (1, 2)] if workers.world() == 1 and mode == 'own' else [(workers.rank(), workers.world())]
        for batch in zip(*(memory.TrainBatches(images, 32, 1, False, 0, *share, epoch) for share in shares)):
            optimizer.zero_grad()
            losses.append(0)
            for x, labels, size in batch:
                loss = step(x, labels)[1].total(opt.beta, opt.gamma)
                (loss * (len(labels) / size * workers.world())).backward()
                losses[-1] += loss.detach() * len(labels) / size
            workers.average_gradients_(params.values())
            optimizer.step()
    losses = torch.stack(losses)
    if workers.world() > 1:
        dist.all_reduce(losses)
    return {'losses': losses, 'params': {k: v.detach() for k, v in params.items()}}


def main():
    if workers.world() > 1:
        dist.init_process_group('gloo')
    torch.set_num_threads(1)
    found = {mode: steps(mode) for mode in MODES}
    if workers.rank() == 0:
        torch.save(found, sys.argv[1])


if __name__ == '__main__':
    ending.run(main)
