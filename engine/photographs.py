"""Shared by imagenet.py and finetune.py: flags, batches of photographs, and a teacher from a file."""

from functools import partial

import torch

from engine import teacher
from engine.arguments import number, path
from engine.flags import HOLDOUT
from engine.loop import Data, count
from engine.machine import shared_on_machine
from engine.student import Network
from engine.workers import rank, say, world
from formats.networks import checkpoint_of, load_teacher
from images import photographs as images


def add_flags(flag):
    """Add the flags that `build_data` and `build_teacher` read; flag: a group's add_argument."""
    flag('--follow_links', action='store_true', help='read images through links that lead out of the folder')
    held = f'{HOLDOUT}: the same part of each class'
    flag('--holdout', default=0, type=number(int, 0), metavar='N', help=held)
    flag('--image_size', default=224, type=number(int, 32, 1024), help='height and width, like 64, 128 or 224')
    flag('--skip_bad_images', action='store_true', help='leave unreadable images out of the evaluation')
    file = 'file with the teacher, or torchvision:resnet34 (default: no teacher)'
    flag('--teacher_params', default='', type=path, help=file)
    flag('--skip_teacher_check', action='store_true', help='do not evaluate the teacher first')


def build_data(opt, load, device, least=1):
    """The data set that load() lists as `Data`, and a function that returns training images for int8 calibration.

    A training batch has at least `least` images over all workers.
    """
    shared = shared_on_machine(lambda: images.share(images.hold_out(load(), opt.holdout)))
    dataset = shared.value
    say(f'{len(dataset.train.labels):,} training and {len(dataset.test.labels):,} validation images')
    share = rank(), world(), opt.nthread, device
    sizes = opt.batch_size, opt.image_size, opt.seed
    train = partial(images.TrainBatches, shared, *sizes, *share, least=least)
    test = partial(images.TestBatches, shared, opt.batch_size, opt.image_size, *share, opt.skip_bad_images)
    blank = torch.zeros(1, 3, opt.image_size, opt.image_size, device=device)
    sample = partial(images.sample, dataset.train, opt.image_size)
    return Data(train, test, count(dataset), blank, (1, min(5, dataset.num_classes))), sample


def build_teacher(opt, data, sample):
    """The teacher as x -> (logits, groups), its batch norm folded; None if no teacher is named."""
    if not opt.teacher_params:
        return None
    network = Network(*load_teacher(checkpoint_of(opt.teacher_params), note=say))
    check = not opt.skip_teacher_check
    f, accuracies = teacher.build(opt, opt.teacher_params, network, data, sample, check)
    if accuracies:
        say('teacher:', ', '.join(f'top-{k} {a:.2f}%' for k, a in zip(data.topk, accuracies)))
    return f
