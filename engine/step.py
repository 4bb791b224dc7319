"""One training step: the student's losses against what is kept of the teacher, and the optimizer."""

import contextlib
import statistics
import time
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

import utils
from engine import transfer
from engine.meters import CALMER, Meters
from engine.precision import autocast
from engine.schedules import beta_at
from engine.student import pair
from engine.workers import average_gradients_, world
from images import children
from layers import full, keep_strides
from utils import DTYPES

PART = 64  # images of a pass of an int8 teacher: its activations stay in the cache, a step is 3% faster
FLUSH = 20  # training or test batches between two reads of the results: each makes the host wait for the device
LEAST_SCALE = 1e-8  # of a float16 loss: gradients that are infinite here are infinite at any scale


class Losses(NamedTuple):
    """The losses of a batch: scalars, unweighted except `task`."""

    task: torch.Tensor  # of the labels and the teacher's logits: cross entropy, or `utils.distillation`
    parts: dict  # its parts ce and kd, only for the log
    transfer: dict  # at0, at1, ... or the terms of another --transfer, weighted by beta
    penalty: dict  # that of --penalty, weighted by gamma

    def total(self, beta, gamma):
        """The weighted sum, which is differentiated."""
        weighted = [beta * loss for loss in self.transfer.values()] + [gamma * loss for loss in self.penalty.values()]
        return sum(weighted, self.task)

    def named(self):
        """The losses for the log: {name: scalar}."""
        return {**self.parts, **self.transfer, **self.penalty}


def make_step(opt, student, teacher, device):
    """The training step as a function: step(images, labels) -> (logits, `Losses`).

    student and teacher are x -> (logits, groups); teacher may be None. With --compile, full batches use the compiled
    student and losses, and on GPUs the compiled teacher.
    """
    of_image, penalty = transfer.of_image(opt), transfer.PENALTIES.get(opt.penalty)
    needs_gradient, teach = bool(of_image or penalty), _teaching(opt, teacher, device)

    def learn(images, labels, teacher_logits, kept, teacher_gradient):
        logits, groups = _run(opt, student, images, device)
        task, parts = classify(logits, teacher_logits, labels)
        if needs_gradient:
            j = utils.input_gradient(logits, images, labels, create_graph=True)
        losses = transfer.losses(opt, groups, kept)
        if of_image:
            losses[of_image.term] = of_image.loss(j, teacher_gradient, opt)
        penalties = {opt.penalty: penalty.loss(j, partial(student_gradient, labels), images)} if penalty else {}
        return logits, Losses(task, parts, losses, penalties)

    def classify(logits, teacher_logits, labels):
        """The loss of the logits, and its parts for the log."""
        if not opt.alpha:
            ce = F.cross_entropy(logits, labels)
            return ce, {'ce': ce.detach()}
        task = utils.distillation(logits, teacher_logits, labels, opt.temperature, opt.alpha)
        with torch.no_grad():
            kd = utils.kd_loss(logits, teacher_logits, opt.temperature)
            return task, {'ce': F.cross_entropy(logits, labels), 'kd': kd}

    def student_gradient(labels, images):
        images = images.detach().requires_grad_()
        return utils.input_gradient(_run(opt, student, images, device)[0], images, labels, create_graph=True)

    def both(images, labels):
        return learn(images, labels, *teach(images, labels))

    on_whole_batches = _compiled(opt, both, learn, teach, device) if opt.compile else both

    def step(images, labels):
        images = images.detach().requires_grad_(needs_gradient)
        whole = len(images) == opt.batch_size // world()  # another size would need a compilation of its own
        return (on_whole_batches if whole else both)(images, labels)

    return step


def _run(opt, network, images, device):
    with autocast(device, opt.dtype):
        logits, groups = network(images)
    return full(logits), groups


def _teaching(opt, teacher, device):
    """What the losses need of the teacher: (images, labels) -> (logits, what is kept of groups, input gradient)."""
    of_image = bool(transfer.of_image(opt))
    if teacher is None or not (opt.alpha or opt.beta):
        return lambda images, labels: (None, {}, None)

    def teach(images, labels):
        with torch.set_grad_enabled(of_image):
            logits, groups = _run(opt, teacher, images, device)
            gradient = utils.input_gradient(logits, images, labels) if of_image else None
            return logits.detach(), transfer.kept(opt, groups), gradient

    def teach_in_parts(images, labels):
        logits, kept = zip(*(teach(part, labels)[:2] for part in images.split(PART)))
        return torch.cat(logits), {name: torch.cat([part[name] for part in kept]) for name in kept[0]}, None

    return teach_in_parts if opt.teacher_dtype == 'int8' else teach


def _compiled(opt, both, learn, teach, device):
    """`both` compiled, on CPUs without the teacher, which gains nothing there; with --cuda_graphs, as CUDA graphs."""
    keep_strides()
    children.import_safely()  # the compiler starts a Python process to query the processor
    if device.type == 'cpu':
        compiled = torch.compile(learn, dynamic=False)
        return lambda images, labels: compiled(images, labels, *teach(images, labels))
    if not opt.cuda_graphs:
        return torch.compile(both, dynamic=False)
    replayed = torch.compile(both, dynamic=False, mode='reduce-overhead')

    def replay(images, labels):
        torch.compiler.cudagraph_mark_step_begin()
        return torch.utils._pytree.tree_map(torch.clone, replayed(images, labels))  # the next replay overwrites them

    return replay


def total_loss(opt, step, sample, epoch, meters):
    """The loss that this worker differentiates, and the logits; adds the named losses to the meters.

    sample: (images, labels, size of the global batch). Gradients are averaged over workers, so a worker's loss is
    weighted by its part of the global batch.
    """
    images, labels, size = sample
    logits, losses = step(images, labels)
    total = losses.total(beta_at(epoch, opt.epochs, opt.beta, opt.beta_decay), opt.gamma)
    part = len(labels) / size
    named = {'loss': total, **losses.named()}
    meters.add({name: loss.detach() * part for name, loss in named.items()}, logits, labels, size)
    return total * (part * world()), logits


class Updates:
    """The paper's optimizer, with the interface of torchnet's Engine; in float16 it scales losses.

    SGD with momentum 0.9 and weight decay on all trained parameters. A float16 loss is scaled up as far as its
    gradients stay finite, because small ones would vanish; a step with infinite gradients is skipped
    (Micikevicius et al. 2018, section 3.2; torch.amp.GradScaler).
    """

    def __init__(self, opt, trained, device):
        self.trained, half = list(trained), DTYPES[opt.dtype] == torch.float16
        # With fused=True, a skipped first step would leave momentum uninitialised (PyTorch 2.14).
        how = {'foreach': True} if half else {'fused': True}
        self.optimizer = torch.optim.SGD(self.trained, opt.lr, momentum=0.9, weight_decay=opt.weight_decay, **how)
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)

    def zero_grad(self):
        self.optimizer.zero_grad()

    def step(self, closure):
        """Take a step with the gradients that closure() computes from a loss of `scaled`, averaged over workers."""
        closure()
        average_gradients_(self.trained)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def scaled(self, loss, logits):
        return self.scaler.scale(loss), logits

    def check_scale(self, epoch):
        """Raise FloatingPointError if gradients are infinite at every scale, so that nothing is learnt."""
        if self.scaler.is_enabled() and self.scaler.get_scale() < LEAST_SCALE:
            raise FloatingPointError(f'epoch {epoch}: the gradients in float16 are not finite at any scale; {CALMER}')


def make_update(opt, student, teacher, image):
    """A complete training step as a function update(images, labels), without log and checkpoint.

    student: a Network. teacher: x -> (logits, groups), or None. image: an input of the training size, (1, 3, H, W).
    """
    with contextlib.redirect_stdout(None):
        network = partial(pair(opt, student, teacher, image), params=student.params, mode=True)
    step, meters = make_step(opt, network, teacher, image.device), Meters(image.device, (1,))
    updates = Updates(opt, [v for v in student.params.values() if v.requires_grad], image.device)

    def update(images, labels):
        sample = images, labels, len(images)
        updates.zero_grad()
        updates.step(lambda: updates.scaled(*total_loss(opt, step, sample, 1, meters))[0].backward())
        if len(meters.pending) == FLUSH:
            meters.flush(1)

    return update


def seconds_a_step(opt, student, teacher, images, steps=3):
    """The seconds of a training step on images (N, 3, H, W): the median of `steps` after one warm-up step."""
    update, times = make_update(opt, student, teacher, images[:1]), []
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    for _ in range(1 + steps):
        start = time.perf_counter()
        update(images, labels)
        if images.device.type == 'cuda':
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
