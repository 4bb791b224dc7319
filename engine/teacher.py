"""The network that teaches: found, checked against the data and its own log, folded and frozen."""

import math
from functools import partial

import torch

from engine import runs
from engine.evaluate import evaluate
from engine.int8 import quantize
from engine.log import read_log
from engine.precision import freeze, place
from engine.student import Network
from engine.transfer import of_image
from engine.workers import say
from formats.networks import fold, load_teacher

LITTLE_MORE = 1.25  # times the accuracy of guessing: a teacher of less has little to teach


def find(teacher_id):
    """The network and the last log line of a run, named as `runs.find` takes it: (Network, record).

    Raises OSError where log or model is missing and ValueError where they are damaged or of different networks.
    """
    log, model = runs.find(teacher_id)
    records = read_log(log)
    if not records:
        raise ValueError(f'--teacher_id {teacher_id}: {log} has no line of results')
    network = load_teacher(model, (records[-1].get('depth'), records[-1].get('width')), say)
    return Network(*network), records[-1]


def build(opt, name, network, data, sample, check=True):
    """The teacher for training, and its accuracies on the test images: (x -> (logits, groups), [percent, ...]).

    name: what messages call it. sample() gives training images that int8 is fitted to. Accuracies are None where the
    teacher has other classes than the data, or without `check`. Raises ValueError for a teacher that cannot teach.
    """
    same_classes = check_classes(opt, name, network.params, data.num_classes)
    network = Network(network.f, frozen(opt, network, sample, data.device))
    accuracies = None
    if same_classes and check:
        accuracies = evaluate_teacher(name, network, data, opt.dtype)
    return partial(network.f, params=network.params, mode=False), accuracies


def frozen(opt, network, sample, device):
    """A teacher's parameters, folded, in the dtypes of the flags; sample() gives images that int8 is fitted to.

    Raises ValueError for int8 where the device has no such convolutions.
    """
    folded = fold(place(network.params, opt.dtype, torch.device('cpu')))
    if opt.teacher_dtype == 'int8':
        if device.type != 'cpu' or not torch.backends.mkldnn.is_available():
            raise ValueError('--teacher_dtype int8: only on CPUs, with a PyTorch that has oneDNN')
        return place(folded, 'float', device) | quantize(network.f, folded, sample())
    return freeze(folded, opt.dtype, device)


def check_classes(opt, name, params, num_classes):
    """Whether a teacher has the classes of the data, so that its accuracy can be tested.

    A teacher of other classes can only teach what does not take its logits; a note says that it is not tested. Raises
    ValueError where the flags have its logits teach.
    """
    found = len(params['fc.bias'])
    if found == num_classes:
        return True
    classes = f'{name} has {found} output classes, the data set has {num_classes}'
    if of_image(opt):
        raise ValueError(
            f'{classes}: --transfer {opt.transfer} differentiates the loss of both networks by the same labels'
        )
    if opt.alpha:
        raise ValueError(f'{classes}: distillation compares them one by one (--alpha 0 lets it teach attention)')
    say(f'teacher: {classes}; its logits are not used, and its accuracy is not tested')
    return False


def evaluate_teacher(name, network, data, dtype):
    """The accuracies that `evaluate` finds, and a note where they are those of guessing.

    Raises ValueError where the logits of the teacher of that name are not finite.
    """
    loss, accuracies = evaluate(network, data.test(), data.device, dtype, data.topk)
    if not math.isfinite(loss):
        raise ValueError(f'{name} cannot teach: its logits on the test images are not finite (cross entropy {loss})')
    if accuracies[0] < LITTLE_MORE * 100 / data.num_classes:
        say(
            f'note: {name} is right on {accuracies[0]:.2f}%, hardly more than by guessing among '
            f'{data.num_classes} classes'
        )
    return accuracies


def check_accuracy(record, accuracy, same_test_set, teacher_dtype='same'):
    """Refuse a teacher whose accuracy is not what the last line of its own log says, to half a point."""
    logged = record.get('test_acc')
    logged = logged[0] if isinstance(logged, list) and logged else logged
    if not isinstance(logged, (int, float)) or not same_test_set:
        say(f'teacher: {accuracy:.2f}% on these test images; its log has no figure to compare that with')
    elif not abs(logged - accuracy) <= 0.5:
        raise ValueError(
            f'the teacher is right on {accuracy:.2f}% of the test images, but on {logged:.2f}% by its own log: '
            f'{"int8 is too coarse for it, " if teacher_dtype == "int8" else ""}'
            'its log and model do not belong together, or the data are not what it was trained on'
        )
    else:
        say(f'teacher: {accuracy:.2f}% on the test images, {logged:.2f}% by its log')
