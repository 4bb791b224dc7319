"""Training steps of every method on a small network of every family; as a command, by several workers.

torchrun --standalone --nproc-per-node 2 every_method.py FOLDER. Each worker writes to FOLDER/RANK.json what
`steps_of` returns.
"""

import hashlib
import itertools
import json
import os
import sys
from functools import partial

import torch
import torch.distributed as dist

from engine import ending, resume, workers
from engine.arguments import Parser
from engine.flags import check, common_flags
from engine.meters import Meters
from engine.precision import freeze
from engine.step import Updates, make_step, total_loss
from engine.student import initialise, pair
from engine.transfer import PENALTIES, TRANSFERS
from formats.networks import NETWORKS, fold
from images import memory

SHAPES = {  # flags of student and teacher, and the size of an image
    'wrn': ('--depth 10 --width 0.5', '--depth 16 --width 1', 32),
    'nin': ('--width 0.25', '--width 0.5', 32),
    'nin without batch norm': ('--width 0.25 --no_bn', '--width 0.5 --no_bn', 32),
    'resnet': ('--depth 18 --width 0.125', '--depth 50 --width 0.125', 64),
}
METHODS = [
    *('', '--alpha 0.9', '--beta 1 --alpha 0.9 --beta_decay linear'),
    *(f'--beta 1 --transfer {name}' for name in TRANSFERS),
    *(f'--penalty {name} --gamma 1' for name in PENALTIES),
]
RECIPE = {'batch_size': 4, 'epochs': 2, 'epoch_step': '[2]', 'lr_decay_ratio': 0.1, 'weight_decay': 1e-4}


def flags_of(words):
    parser = Parser('')
    parser.add_argument('--no_bn', action='store_true')
    common_flags(parser, '4.1', depth=16, **RECIPE)
    opt = parser.parse_args(words.split())
    check(opt, True, '')
    return opt


def prepared(family, method, dtype, device):
    """The flags, the student, and the step and teacher functions, as a script's main prepares them."""
    student_shape, teacher_shape, size = SHAPES[family]
    build = NETWORKS[family.split()[0]].network
    opt = flags_of(f'{student_shape} {method} --dtype {dtype}')
    student = initialise(build(opt), opt, 10, device)
    f, params = build(flags_of(teacher_shape))(10)
    teacher = partial(f, params=freeze(fold(params), opt.dtype, device), mode=False)
    trained = pair(opt, student, teacher, torch.zeros(1, 3, size, size, device=device))
    learner = workers.data_parallel(trained, student.params)
    return opt, student, make_step(opt, learner, teacher, device)


def steps_of(family, method, dtype, steps=3):
    """What a worker has after some steps, as hashes, and the parameters that had no gradient in one of them."""
    device = torch.device('cpu')
    opt, student, step = prepared(family, method, dtype, device)
    size, count = SHAPES[family][2], steps * opt.batch_size
    pixels = torch.randint(256, (count, size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = memory.Images(pixels, torch.arange(count) % 10)
    params, meters = resume.trained(student.params), Meters(device, (1,))
    updates, without = Updates(opt, params.values(), device), set()
    before = hashes(params)
    for sample in memory.TrainBatches(images, opt.batch_size, 2, True, 0, workers.rank(), workers.world(), 1):
        updates.zero_grad()
        updates.step(lambda sample=sample: updates.scaled(*total_loss(opt, step, sample, 1, meters))[0].backward())
        without |= {name for name, value in params.items() if value.grad is None}
    meters.flush(1)  # refuses a loss that is not finite
    state = {k: hashes(updates.optimizer.state[v]) for k, v in params.items()}
    return {'before': before, 'after': hashes(params), 'state': state, 'without gradient': sorted(without)}


def hashes(tensors):
    return {k: hashlib.sha256(v.detach().contiguous().numpy().tobytes()).hexdigest() for k, v in tensors.items()}


def main():
    dist.init_process_group('gloo')
    torch.set_num_threads(1)
    cases = itertools.product(SHAPES, METHODS, ('float', 'bfloat16'))
    found = {', '.join(case): steps_of(*case) for case in cases}
    with open(os.path.join(sys.argv[1], f'{workers.rank()}.json'), 'w', encoding='utf-8') as file:
        json.dump(found, file)


if __name__ == '__main__':
    ending.run(main)
