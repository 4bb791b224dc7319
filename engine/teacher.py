"""The teacher: found, checked against the data and its own log, folded and frozen."""

import math
from functools import partial

import torch

from engine import int8, runs
from engine.evaluate import evaluate, say_script
from engine.log import read_log
from engine.precision import freeze, place
from engine.student import Network
from engine.transfer import of_image
from engine.workers import say
from formats.networks import fold, load_teacher

LITTLE_MORE = 1.25  # times the accuracy of guessing: a teacher below that has little to teach


def find(teacher_id):
    """The network and the last log record of a run, named as for `runs.find`: (Network, record).

    Raises OSError if log or model is missing and ValueError if they are damaged or of different networks.
    """
    log, model = runs.find(teacher_id)
    records = read_log(log)
    if not records:
        raise ValueError(f'--teacher_id {teacher_id}: {log} has no line of results')
    record = records[-1]
    shape = (record.get('depth'), record['width']) if 'width' in record else None  # older logs of finetune.py have none
    return Network(*load_teacher(model, shape, say)), record


def build(opt, name, network, data, sample, check=True):
    """The teacher for training, and its accuracies on the test images: (x -> (logits, groups), [percent, ...]).

    name: its name in messages. sample() returns training images for int8 calibration. Accuracies are None if the
    teacher has other classes than the data, or without `check`. Raises ValueError for a teacher that cannot teach.
    """
    say_script(opt, name, network.params)
    same_classes = check_classes(opt, name, network.params, data.num_classes)
    network = Network(network.f, frozen(opt, network, sample, data.device))
    accuracies = None
    if same_classes and check:
        accuracies = evaluate_teacher(name, network, data, opt.dtype)
    return partial(network.f, params=network.params, mode=False), accuracies


def frozen(opt, network, sample, device):
    """A teacher's parameters, folded, in the dtypes of the flags; sample() returns images for int8 calibration.

    Raises ValueError for int8 if the device has no exact int8 convolutions.
    """
    folded = fold(place(network.params, opt.dtype, torch.device('cpu')))
    if opt.teacher_dtype == 'int8':
        if device.type != 'cpu' or not int8.exact():
            raise ValueError('--teacher_dtype int8: only on CPUs with VNNI instructions and a PyTorch that has oneDNN')
        return place(folded, 'float', device) | int8.quantize(network.f, folded, sample())
    return freeze(folded, opt.dtype, device)


def check_classes(opt, name, params, num_classes):
    """Whether a teacher has as many classes as the data set, so that its accuracy can be tested.

    With another number, only methods without its logits can be used, and a note says that it is not tested. Raises
    ValueError if the flags use its logits.
    """
    classes = len(params['fc.bias'])
    if classes == num_classes:
        return True
    mismatch = f'{name} has {classes} output classes, the data set has {num_classes}'
    if of_image(opt):
        raise ValueError(
            f'{mismatch}: --transfer {opt.transfer} differentiates the loss of both networks on the same labels'
        )
    if opt.alpha:
        raise ValueError(f'{mismatch}: distillation compares them one by one (--alpha 0 lets it teach attention)')
    say(f'teacher: {mismatch}; its logits are not used, and its accuracy is not tested')
    return False


def evaluate_teacher(name, network, data, dtype):
    """A teacher's accuracies from `evaluate`; prints a note if they are hardly better than guessing.

    Raises ValueError if its logits are not finite. name: its name in messages.
    """
    loss, accuracies = evaluate(network, data.test(), data.device, dtype, data.topk)
    if not math.isfinite(loss):
        raise ValueError(f'{name} cannot teach: its logits on the test images are not finite (cross entropy {loss})')
    if accuracies[0] < LITTLE_MORE * 100 / data.num_classes:
        say(
            f'note: {name} has an accuracy of {accuracies[0]:.2f}%, hardly better than guessing among '
            f'{data.num_classes} classes'
        )
    return accuracies


def check_accuracy(record, accuracy, same_images, teacher_dtype='same'):
    """Raise ValueError if a teacher's accuracy is too far from the last line of its own log.

    same_images: the number of test images, or 0 if they are not those of the log. Allowed is half a point, and on fewer
    than 10,000 images the standard error of an accuracy of 50 %: in another dtype, some images change their class.
    """
    logged = record.get('test_acc')
    logged = logged[0] if isinstance(logged, list) and logged else logged
    if not isinstance(logged, (int, float)) or not same_images:
        say(f'teacher: {accuracy:.2f}% on these test images; its log has no accuracy on the same ones')
    elif not abs(logged - accuracy) <= max(0.5, 50 / math.sqrt(same_images)):
        raise ValueError(
            f'the teacher has an accuracy of {accuracy:.2f}% on the test images, but {logged:.2f}% by its own log: '
            f'{"int8 is too coarse for it, " if teacher_dtype == "int8" else ""}'
            'its log and model do not belong together, or the data are not what it was trained on'
        )
    else:
        say(f'teacher: {accuracy:.2f}% on the test images, {logged:.2f}% by its log')
