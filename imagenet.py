"""Attention transfer between ResNets on ImageNet (section 4.2.2 of the paper, table 5).

    python imagenet.py --imagenetpath ~/ILSVRC2012 --depth 18 --width 1 --teacher_params resnet-34-export.hkl \\
        --gpu_id 0,1 --ngpu 2 --beta 1e+3

In the paper ResNet-18 errs on 30.4% (top-1) and 10.8% (top-5) alone, and on 29.3% and 10.0% taught by ResNet-34
(26.1% and 8.3%). That has not been run with this code.
"""

from functools import partial

import torch

import ending
import engine
import imagefolder
import options
import workers
from formats.networks import NETWORKS, load_teacher


def parse():
    """The flags, with the recipe of section 4.2.2 as defaults; ValueError where they cannot be followed."""
    parser = options.Parser(__doc__)
    flag = parser.add_argument_group('data and teacher (section 4.2.2)').add_argument
    flag('--imagenetpath', default='.', type=options.path, help='folder that holds train/<class>/* and val/<class>/*')
    photograph_flags(flag)
    options.common_flags(
        parser,
        '4.2.2',
        depth=18,
        batch_size=256,
        epochs=100,
        epoch_step='[30,60,90]',
        lr_decay_ratio=0.1,
        weight_decay=0.0001,
    )
    opt = parser.parse_args()
    options.check(opt, opt.teacher_params, '--teacher_params')
    with torch.device('meta'):  # no memory: a shape that is none is told before anything else begins
        NETWORKS['resnet'].network(opt)(2)
    return opt


def photograph_flags(flag):
    """Add the flags that `build_batches` and `build_teacher` read; flag: add_argument of a group."""
    flag('--follow_links', action='store_true', help='read images that links out of that folder lead to')
    held = f'{options.HOLDOUT}: the same part of each class'
    flag('--holdout', default=0, type=options.number(int, 0), metavar='N', help=held)
    flag('--image_size', default=224, type=options.number(int, 32, 1024), help='like 64, 128, 160, 224 (default), 256')
    flag('--skip_bad_images', action='store_true', help='leave unreadable images out of the evaluation')
    teacher = 'file with the teacher, or torchvision:resnet34; none trains a baseline'
    flag('--teacher_params', default='', type=options.path, help=teacher)
    flag('--skip_teacher_check', action='store_true', help='do not evaluate the teacher first')


def build_batches(opt, dataset, device, least=1):
    """What makes batches of a data set as of `imagefolder` on the device: train_batches(epoch) and test_batches().

    A batch to train on has at least `least` images over all workers.
    """
    workers.say(f'{len(dataset.train.labels):,} training and {len(dataset.test.labels):,} validation images')
    share = workers.rank(), workers.world(), opt.nthread, device
    sizes = opt.batch_size, opt.image_size, opt.seed
    train_batches = partial(imagefolder.TrainBatches, dataset.train, *sizes, *share, least=least)
    test_batches = partial(
        imagefolder.TestBatches, dataset.test, opt.batch_size, opt.image_size, *share, opt.skip_bad_images
    )
    return train_batches, test_batches


def build_teacher(opt, dataset, test_batches, topk, device):
    """The teacher as x -> (logits, groups), its batch norm folded; None where no teacher is named.

    One of other classes is not evaluated, and teaches by its activations alone.
    """
    if not opt.teacher_params:
        return None
    f, params = load_teacher(opt.teacher_params, note=workers.say)
    same_classes = engine.check_classes(opt, opt.teacher_params, params, dataset.num_classes)
    sample = partial(imagefolder.sample, dataset.train, opt.image_size)
    params = engine.frozen(opt, f, params, sample, device)
    if same_classes and not opt.skip_teacher_check:
        accuracies = engine.evaluate_teacher(opt.teacher_params, f, params, test_batches(), device, opt.dtype, topk)
        workers.say('teacher:', ', '.join(f'top-{k} {a:.2f}%' for k, a in zip(topk, accuracies)))
    return partial(f, params=params, mode=False)


def main():
    """Train a ResNet on a folder of images, as the flags say."""
    opt = parse()
    device = engine.start(opt)
    workers.say('parsed options:', vars(opt))
    dataset = imagefolder.hold_out(imagefolder.load(opt.imagenetpath, opt.follow_links, workers.say), opt.holdout)
    # Batch norm of 1x1 maps, the last at 32 pixels, needs two images: of each worker, or with --sync_bn of all.
    least = (2 if opt.sync_bn else 2 * workers.world()) if opt.image_size == 32 else 1
    train_batches, test_batches = build_batches(opt, dataset, device, least)
    topk = 1, min(5, dataset.num_classes)
    f, params = engine.draw(NETWORKS['resnet'].network(opt), opt, dataset.num_classes, device)
    teacher = build_teacher(opt, dataset, test_batches, topk, device)
    blank = torch.zeros(1, 3, opt.image_size, opt.image_size, device=device)
    trained = engine.prepare(opt, f, params, teacher, blank)
    student = workers.data_parallel(trained, params, sync_bn=opt.sync_bn)
    step = engine.make_step(opt, student, teacher, device)
    engine.fit(opt, step, f, params, train_batches, test_batches, device, engine.counts(dataset), topk)


if __name__ == '__main__':
    ending.run(main)
