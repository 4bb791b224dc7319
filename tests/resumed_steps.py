"""Six steps of AT + KD by any number of workers, uninterrupted, and resumed after two.

torchrun --standalone --nproc-per-node 3 resumed_steps.py OUT.json. The first worker writes what both have at the end.
"""

import json
import sys

import torch
import torch.distributed as dist
from every_method import hashes, prepared

from engine import ending, resume, workers
from engine.meters import Meters
from engine.step import Updates, total_loss

DEVICE = torch.device('cpu')


def begin():
    """The flags, the step, the trained parameters, the optimizer and the meters of a new run."""
    opt, student, step = prepared('wrn', '--beta 100 --alpha 0.5', 'float', DEVICE)
    params = resume.trained(student.params)
    return opt, step, params, Updates(opt, params.values(), DEVICE), Meters(DEVICE, (1,))


def train(run, numbers):
    opt, step, _, updates, meters = run
    for number in numbers:
        images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(100 * number + workers.rank()))
        sample = images, torch.tensor([number, 9]), 2 * workers.world()
        updates.zero_grad()
        updates.step(lambda sample=sample: total_loss(opt, step, sample, 1, meters)[0].backward())
    meters.flush(1)


def found(run):
    _, _, params, _, meters = run
    return {'params': hashes(params), 'losses': {name: meter.value() for name, meter in meters.values.items()}}


def main():
    dist.init_process_group('gloo')
    torch.set_num_threads(1)
    whole, part, resumed = begin(), begin(), begin()
    train(whole, range(6))
    train(part, range(2))
    resumed[4].restore(*part[4].state(0))
    resumed[3].optimizer.load_state_dict(part[3].optimizer.state_dict())
    with torch.no_grad():
        for name, value in resumed[2].items():
            value.copy_(part[2][name])
    train(resumed, range(2, 6))
    if workers.rank() == 0:
        with open(sys.argv[1], 'w', encoding='utf-8') as file:
            json.dump([found(whole), found(resumed)], file)


if __name__ == '__main__':
    ending.run(main)
