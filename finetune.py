"""Attention transfer in fine-tuning, on CUB-200-2011 and MIT Indoor-67 (section 4.2.1 of the paper, table 4).

    python finetune.py --dataset cub --dataroot CUB_200_2011 --pretrained torchvision:resnet34 --save logs/cub_34
    python finetune.py --dataset cub --dataroot CUB_200_2011 --pretrained torchvision:resnet18 \\
        --teacher_params logs/cub_34/model.pt7 --beta 1e+3 --save logs/cub_18_at

Networks pretrained on ImageNet learn new classes with batch norm and the first group of blocks fixed. In the paper,
ResNet-18 has an error of 28.5% (CUB) and 28.2% (Scenes) alone, 27% and 27.1% with attention transfer from ResNet-34,
which has 26.5% and 26%. Only half of the birds' classes have been run with this code, at 64 pixels (docs/results.md).
The paper gives no schedule; this one is our choice.
"""

from functools import partial

import torch

from engine import ending, flags, photographs
from engine.arguments import Parser, number, path
from engine.evaluate import report
from engine.loop import fit, start
from engine.precision import place
from engine.step import make_step
from engine.student import Network, pair
from engine.transfer import group_numbers, of_groups
from engine.workers import data_parallel, say
from formats.networks import checkpoint_of, describe, load_teacher
from imagenet_resnet import imagenet_forward, imagenet_resnet_expected
from images.photographs import DATASETS
from utils import flatten, linear_params, set_requires_grad_except_bn_


def parse():
    """The parsed flags, with defaults from section 4.2.1. Raises ValueError if they contradict each other."""
    parser = Parser(__doc__)
    flag = parser.add_argument_group('data and teacher (section 4.2.1)').add_argument
    flag('--dataset', default='cub', choices=list(DATASETS), help='the data set')
    root = 'folder CUB_200_2011, or one with Images/ and TrainImages.txt, or with train/ and val/'
    flag('--dataroot', default='.', type=path, help=root)
    photographs.add_flags(flag)
    flag = parser.add_argument_group('pretrained network (section 4.2.1)').add_argument
    flag('--pretrained', default='torchvision:resnet18', type=path, help='its file')
    flag('--fixed_groups', default=1, type=number(int, 0, 4), help='groups that are not trained')
    flags.common_flags(
        parser,
        '4.2.1',
        depth=None,
        batch_size=64,
        epochs=60,
        epoch_step='[30,45]',
        lr=0.01,
        lr_decay_ratio=0.1,
        weight_decay=0.0001,
        groups='2,3',
    )
    opt = flags.parse(parser, ('dataset', 'image_size', 'holdout', 'dtype'))
    if flags.TRANSFERS[opt.transfer].at_image and opt.groups == parser.get_default('groups'):
        opt.groups = ''
    flags.check(opt, opt.teacher_params, '--teacher_params')
    fixed = [n for n in group_numbers(opt.groups, 4) if n < opt.fixed_groups] if of_groups(opt) else []
    if fixed:
        raise ValueError(f'--groups: group {fixed[0]} is not trained (--fixed_groups {opt.fixed_groups})')
    if opt.sync_bn:
        raise ValueError('--sync_bn: batch norm is fixed in fine-tuning')
    return opt


def build_data(opt, device):
    """Photographs as `Data`, and a function that returns training images for int8 calibration."""
    return photographs.build_data(opt, partial(DATASETS[opt.dataset], opt.dataroot, opt.follow_links, say), device)


def build_student(opt, num_classes, device):
    """The pretrained `Network` with a new last layer; batch norm and the first --fixed_groups are not trained."""
    f, params = load_teacher(checkpoint_of(opt.pretrained), note=say)
    if f is not imagenet_forward or 'bn0.weight' not in params:
        fault = 'it has its batch norm folded' if f is imagenet_forward else 'expected an ImageNet ResNet'
        raise ValueError(f'--pretrained {opt.pretrained} ({describe(params)}): {fault}')
    _, _, (opt.depth, opt.width) = imagenet_resnet_expected(params)  # for the log
    torch.manual_seed(opt.seed)
    params |= flatten({'fc': linear_params(params['fc.weight'].shape[1], num_classes)})
    params = place(params, opt.dtype, device)
    set_requires_grad_except_bn_(params)
    fixed = [f'group{i}.' for i in range(opt.fixed_groups)]
    fixed += ['conv0'] if fixed else []
    for key, value in params.items():
        if key.startswith(tuple(fixed)) or f'{key.rpartition(".")[0]}.running_mean' in params:
            value.requires_grad_(False)
    return Network(f, params)


def main():
    """Fine-tune a pretrained ResNet, or evaluate a network."""
    opt = parse()
    device = start(opt)
    if opt.evaluate:
        return report(opt, device, build_data)
    data, sample = build_data(opt, device)
    student = build_student(opt, data.num_classes, device)
    teacher = photographs.build_teacher(opt, data, sample)
    trained = pair(opt, student, teacher, data.image)
    learner = data_parallel(trained, student.params, mode=False)
    fit(opt, make_step(opt, learner, teacher, device), student, data)


if __name__ == '__main__':
    ending.run(main)
