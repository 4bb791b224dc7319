"""Evaluates a network on a test set; each image counts once over all workers."""

import json
import math
import time

import torch
import torch.nn.functional as F
from torchnet.engine import Engine
from torchnet.meter import AverageValueMeter, ClassErrorMeter

from engine.precision import autocast, place
from engine.step import FLUSH
from engine.student import Network
from engine.workers import say, sum_over_workers
from formats.networks import checkpoint_of, describe, family_of, load_teacher
from layers import full


def evaluate(network, batches, device, dtype='float', topk=(1,), on_batch=lambda: None):
    """The cross entropy and accuracies in percent of a network (f, params) on the batches of all workers.

    Returns (loss, [accuracy for each k of topk]). on_batch() is called after each batch.
    """
    f, params = network
    losses, errors, pending = AverageValueMeter(), ClassErrorMeter(list(topk), accuracy=True), []

    def forward(sample):
        with autocast(device, dtype):
            logits = full(f(sample[0], params, False)[0])
        return F.cross_entropy(logits, sample[1], reduction='sum'), logits

    def on_forward(state):
        pending.append((state['loss'], state['output'].float(), state['sample'][1]))
        if len(pending) == FLUSH:
            flush()
        on_batch()

    def flush(*_):
        if pending:
            sums, logits, labels = zip(*pending)
            for loss, part in zip(torch.stack(sums).tolist(), labels):
                losses.add(loss, len(part))
            errors.add(torch.cat(logits), torch.cat(labels))
            pending.clear()

    engine = Engine()
    engine.hooks.update(on_forward=on_forward, on_end=flush)
    with torch.no_grad():
        engine.test(forward, batches)
    loss, n, *wrong = sum_over_workers([losses.sum, losses.n, *(errors.sum[k] for k in topk)], device)
    if not n:
        raise ValueError('no test image can be read')
    return loss / n, [100 * (1 - w / n) for w in wrong]


def say_script(opt, name, params):
    """Print a note if a network is of a family that another script trains."""
    script = family_of(params).script
    if (script == 'cifar.py') != hasattr(opt, 'net'):  # a flag of cifar.py
        say(f'note: networks like {name} are trained by {script}, which crops and normalises images in another way')


def report(opt, device, build_data):
    """Print and return, as a dictionary, the test loss and accuracies of the network of --evaluate, a run or a file.

    build_data(opt, device) -> (Data, ...) is called once the network is read. With --json the results are the last
    line. Raises ValueError if the network has not as many classes as the data set, and
    FloatingPointError for a loss that is not finite.
    """
    path = checkpoint_of(opt.evaluate)
    f, params = load_teacher(path, note=say)
    data, _ = build_data(opt, device)
    if len(params['fc.bias']) != data.num_classes:
        raise ValueError(f'{path} has {len(params["fc.bias"])} output classes, the data set has {data.num_classes}')
    say_script(opt, path, params)
    network, since = Network(f, place(params, opt.dtype, data.device)), time.perf_counter()
    batches = data.test()
    loss, accuracies = evaluate(network, batches, data.device, opt.dtype, data.topk)
    if not math.isfinite(loss):
        raise FloatingPointError(f'{path}: the test loss is not finite ({loss})')
    images = data.counts['test_images'] - int(sum_over_workers([getattr(batches, 'bad', 0)], data.device)[0])
    speed = images / (time.perf_counter() - since)
    scores = {f'top{k}': accuracy for k, accuracy in zip(data.topk, accuracies)}
    words = [f'top-{k} {accuracy:.2f}%' for k, accuracy in zip(data.topk, accuracies)]
    say(f'{path}: {describe(params)}')
    say(f'{", ".join(words)}, loss {loss:.4f}, {images:,} images, {speed:.0f} images/s')
    results = {**scores, 'loss': loss, 'images': images, 'images_per_second': speed}
    if opt.json:
        say(json.dumps({'network': path, **results}))
    return results
