"""Attention transfer in fine-tuning, on CUB-200-2011 and MIT Indoor-67 (section 4.2.1 of the paper, table 4).

    python finetune.py --dataset cub --dataroot CUB_200_2011 --pretrained torchvision:resnet34 --save logs/cub_34
    python finetune.py --dataset cub --dataroot CUB_200_2011 --pretrained torchvision:resnet18 \\
        --teacher_params logs/cub_34/model.pt7 --beta 1e+3 --save logs/cub_18_at

Networks pretrained on ImageNet learn new classes with batch norm and the first group of blocks fixed. In the paper
ResNet-18 alone errs on 28.5% (CUB) and 28.2% (Scenes), taught by ResNet-34 on 27% and 27.1%, and ResNet-34 on 26.5% and
26%. That has not been run with this code, and the paper gives no schedule: the one here is a choice.
"""

import torch

import ending
import engine
import imagefolder
import imagenet
import options
import workers
from formats.networks import describe, load_teacher
from imagenet_resnet import imagenet_forward, imagenet_resnet_depth
from utils import flatten, linear_params, set_requires_grad_except_bn_


def parse():
    """The flags, with section 4.2.1 as defaults; ValueError where they cannot be followed."""
    parser = options.Parser(__doc__)
    flag = parser.add_argument_group('data and teacher (section 4.2.1)').add_argument
    flag('--dataset', default='cub', choices=list(DATASETS), help='cub (default), scenes or folder')
    root = 'CUB_200_2011, or has Images/ and TrainImages.txt, or train/ and val/'
    flag('--dataroot', default='.', type=options.path, help=root)
    imagenet.photograph_flags(flag)
    flag = parser.add_argument_group('pretrained network (section 4.2.1)').add_argument
    pretrained = 'torchvision:resnet18'
    flag('--pretrained', default=pretrained, type=options.path, help='file with it (default: %(default)s)')
    flag('--fixed_groups', default=1, type=options.number(int, 0, 4), help='groups that stay as they are (default: 1)')
    options.common_flags(
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
    opt = parser.parse_args()
    if opt.transfer == 'gradient' and opt.groups == parser.get_default('groups'):
        opt.groups = ''
    options.check(opt, opt.teacher_params, '--teacher_params')
    if opt.sync_bn:
        raise ValueError('--sync_bn: batch norm is fixed in fine-tuning')
    return opt


def load_folder(root, follow_links):
    """One's own images, cropped as those of the other data sets are."""
    dataset = imagefolder.load(root, follow_links, workers.say)
    return dataset._replace(train=dataset.train._replace(scaled=True))


DATASETS = {'cub': imagefolder.load_cub, 'scenes': imagefolder.load_scenes, 'folder': load_folder}


def build_student(opt, num_classes, device):
    """The pretrained network with a new last layer: (f, params), of which batch norm and --fixed_groups stay fixed."""
    f, params = load_teacher(opt.pretrained, note=workers.say)
    if f is not imagenet_forward or 'bn0.weight' not in params:
        found = describe(params)
        raise ValueError(f'--pretrained {opt.pretrained} ({found}): expected an ImageNet ResNet, not folded')
    opt.depth = imagenet_resnet_depth(params)  # for the log
    torch.manual_seed(opt.seed)
    params |= flatten({'fc': linear_params(params['fc.weight'].shape[1], num_classes)})
    params = engine.place(params, opt.dtype, device)
    set_requires_grad_except_bn_(params)
    fixed = [f'group{i}.' for i in range(opt.fixed_groups)]
    fixed += ['conv0'] if fixed else []
    for key, value in params.items():
        if key.startswith(tuple(fixed)) or f'{key.rpartition(".")[0]}.running_mean' in params:
            value.requires_grad_(False)
    return f, params


def main():
    """Fine-tune a pretrained ResNet, as the flags say."""
    opt = parse()
    device = engine.start(opt)
    workers.say('parsed options:', vars(opt))
    dataset = imagefolder.hold_out(DATASETS[opt.dataset](opt.dataroot, opt.follow_links), opt.holdout)
    train_batches, test_batches = imagenet.build_batches(opt, dataset, device)
    topk = 1, min(5, dataset.num_classes)
    f, params = build_student(opt, dataset.num_classes, device)
    teacher = imagenet.build_teacher(opt, dataset, test_batches, topk, device)
    blank = torch.zeros(1, 3, opt.image_size, opt.image_size, device=device)
    trained = engine.prepare(opt, f, params, teacher, blank)
    student = workers.data_parallel(trained, params, False)
    step = engine.make_step(opt, student, teacher, device)
    engine.fit(opt, step, f, params, train_batches, test_batches, device, engine.counts(dataset), topk)


if __name__ == '__main__':
    ending.run(main)
