"""Attention transfer between ResNets on ImageNet (section 4.2.2 of the paper, table 5).

    python imagenet.py --imagenetpath ~/ILSVRC2012 --depth 18 --width 1 --teacher_params resnet-34-export.hkl \\
        --gpu_id 0,1 --ngpu 2 --beta 1e+3

In the paper ResNet-18 errs on 30.4% (top-1) and 10.8% (top-5) alone, and on 29.3% and 10.0% taught by ResNet-34
(26.1% and 8.3%). That has not been run with this code.
"""

import torch

from engine import ending, flags, photographs
from engine.arguments import Parser, path
from engine.evaluate import report
from engine.loop import fit, start
from engine.step import make_step
from engine.student import initialise, pair
from engine.workers import data_parallel, say, world
from formats.networks import NETWORKS
from images.photographs import load


def parse():
    """The flags, with the recipe of section 4.2.2 as defaults; ValueError where they cannot be followed."""
    parser = Parser(__doc__)
    flag = parser.add_argument_group('data and teacher (section 4.2.2)').add_argument
    flag('--imagenetpath', default='.', type=path, help='folder that holds train/<class>/* and val/<class>/*')
    photographs.add_flags(flag)
    flags.common_flags(
        parser,
        '4.2.2',
        depth=18,
        batch_size=256,
        epochs=100,
        epoch_step='[30,60,90]',
        lr_decay_ratio=0.1,
        weight_decay=0.0001,
    )
    opt = flags.parse(parser, ('image_size', 'holdout', 'dtype'))
    flags.check(opt, opt.teacher_params, '--teacher_params')
    with torch.device('meta'):  # an impossible shape is reported before anything is allocated
        NETWORKS['resnet'].network(opt)(2)
    return opt


def build_data(opt, device):
    """The `Data` of a folder of photographs on the device, and a function that gives some to fit int8 to."""
    dataset = load(opt.imagenetpath, opt.follow_links, say)
    # Batch norm of 1x1 maps, the last at 32 pixels, needs two images: of each worker, or with --sync_bn of all.
    least = (2 if opt.sync_bn else 2 * world()) if opt.image_size == 32 else 1
    return photographs.build_data(opt, dataset, device, least)


def main():
    """Train a ResNet on a folder of photographs, as the flags say."""
    opt = parse()
    device = start(opt)
    data, sample = build_data(opt, device)
    if opt.evaluate:
        return report(opt, data)
    student = initialise(NETWORKS['resnet'].network(opt), opt, data.num_classes, device)
    taught = photographs.build_teacher(opt, data, sample)
    trained = pair(opt, student, taught, data.image)
    learner = data_parallel(trained, student.params, sync_bn=opt.sync_bn)
    fit(opt, make_step(opt, learner, taught, device), student, data)


if __name__ == '__main__':
    ending.run(main)
