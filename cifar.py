"""Attention transfer between small networks on small images (sections 3 and 4.1 of the paper, tables 1 to 3).

    python cifar.py --save logs/resnet_16_2_teacher --depth 16 --width 2
    python cifar.py --save logs/at_16_1_16_2 --teacher_id resnet_16_2_teacher --beta 1e+3
    python cifar.py --save logs/kd_16_1_16_2 --teacher_id resnet_16_2_teacher --alpha 0.9

    python cifar.py --save logs/nin_thin --net nin --width 0.4375

WRN-16-1 alone errs on 8.77% of CIFAR-10's test images in the paper, with attention transfer from WRN-16-2 on 7.93%.
"""

from functools import partial

import data
import engine
import options
from nin import nin
from resnet import wide_resnet

# The flags that say which images are tested on, and their values where an older log does not hold them.
TEST_SET = {'dataset': 'CIFAR10', 'holdout': 0, 'image_size': 32}


def parse():
    parser = options.Parser(__doc__)
    flag = parser.add_argument_group('data and teacher').add_argument
    flag('--dataset', default='CIFAR10', help='CIFAR10, CIFAR100, folder or digits')
    flag('--dataroot', '--data_root', default='.', help='where the data set is, or is to be downloaded')
    flag('--image_size', default=32, type=options.number(int, 8, 512), help='for folder and digits (default: 32)')
    flag('--randomcrop_pad', default=4, type=options.number(float, 0, 511), help='pixels around a crop (default: 4)')
    flag('--holdout', default=0, type=options.number(int, 0), help='test on the last N training images instead')
    flag('--teacher_id', default='', help='name of the run in logs/ whose network teaches')
    flag = parser.add_argument_group('kind of network').add_argument
    flag('--net', default='wrn', choices=['wrn', 'nin'], help='wide ResNet or Network-in-Network (table 1)')
    flag('--no_bn', action='store_true', help='a Network-in-Network with biases instead of batch norm (table 3)')
    options.common_flags(
        parser,
        depth=16,
        batch_size=128,
        epochs=200,
        epoch_step='[60,120,160]',
        lr_decay_ratio=0.2,
        weight_decay=0.0005,
    )
    opt = parser.parse_args()
    options.check(opt, opt.teacher_id, '--teacher_id')
    if opt.net == 'nin':
        opt.depth = None
    elif opt.no_bn:
        raise ValueError('--no_bn: a wide ResNet has batch norm; --net nin can do without')
    network(opt)(2)  # a shape that is none is told before anything else begins
    if opt.randomcrop_pad % 1 or opt.randomcrop_pad >= opt.image_size:
        raise ValueError(f'--randomcrop_pad {opt.randomcrop_pad:g}: expected whole pixels, fewer than the image has')
    return opt


def network(opt):
    """What draws the student: num_classes -> (f, params)."""
    if opt.net == 'nin':
        return partial(nin, opt.width, no_bn=opt.no_bn)
    return partial(wide_resnet, opt.depth, opt.width)


def build_data(opt, device):
    """The data set, and train_batches(epoch) and test_batches() on the device."""
    dataset = data.load(opt.dataset, opt.dataroot, opt.image_size, opt.holdout, opt.nthread, engine.say)
    engine.say(f'{opt.dataset}: {len(dataset.train.labels):,} training and {len(dataset.test.labels):,} test images')
    train, test = dataset.train.to(device), dataset.test.to(device)
    augment = int(opt.randomcrop_pad), dataset.flip, opt.seed
    workers = engine.rank(), engine.world()
    train_batches = partial(data.TrainBatches, train, opt.batch_size, *augment, *workers)
    return dataset, train_batches, partial(data.TestBatches, test, opt.batch_size, *workers)


def build_teacher(opt, dataset, test_batches, device):
    """The teacher as x -> (logits, groups), checked against its own log; None where no teacher is named."""
    if not opt.teacher_id:
        return None
    f, params, record = engine.find_teacher(opt.teacher_id)
    engine.check_classes(f'--teacher_id {opt.teacher_id}', params, dataset.num_classes)
    params = engine.place(params, opt.dtype, device)
    _, (accuracy,) = engine.evaluate(f, params, test_batches(), device, opt.dtype)
    same = all(record.get(flag, default) == getattr(opt, flag) for flag, default in TEST_SET.items())
    engine.check_teacher(record, accuracy, same)
    return partial(f, params=params, mode=False)


def main():
    opt = parse()
    device = engine.start(opt)
    engine.say('parsed options:', vars(opt))
    dataset, train_batches, test_batches = build_data(opt, device)
    f, params = engine.draw(network(opt), opt, dataset.num_classes, device)
    teacher = build_teacher(opt, dataset, test_batches, device)
    trained = engine.prepare(opt, f, params, teacher, next(iter(test_batches()))[0][:1])
    student = engine.data_parallel(trained, params, 'sync' if opt.sync_bn else True)
    step = engine.make_step(opt, student, teacher, device)
    engine.fit(opt, step, f, params, train_batches, test_batches, device, engine.counts(dataset))


if __name__ == '__main__':
    options.run(main)
