"""The one training loop: torchnet's Engine, its meters, mixed precision, workers, the log.

Everything that is logged or learnt is a function of the global batch and does not depend on the number of workers,
but for batch norm, whose statistics each worker takes of its own share.
"""

import contextlib
import json
import math
import os
import statistics
import time
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torchnet.engine import Engine
from torchnet.meter import AverageValueMeter, ClassErrorMeter
from tqdm import tqdm

import children
import runs
import workers
from formats import networks
from formats.write import save
from int8 import quantize
from layers import STATISTICS, full
from runs import read_log
from schedules import beta_at, lr_at
from stopping import Requests, Stopped
from utils import (
    DTYPES,
    adapt,
    adapter_params,
    attention_map,
    cast,
    full_activation_loss,
    gradient_loss,
    input_gradient,
    kd_loss,
    map_loss,
    num_trained,
    print_tensor_dict,
    set_requires_grad_except_bn_,
    without_adapters,
)
from workers import join_statistics_, rank, say, sum_over_workers, world

FLUSH = 20  # steps between two looks at the losses: each look makes the host wait for the device
CALMER = 'try a lower --lr or --beta, or --dtype float'
LITTLE_MORE = 1.25  # times the accuracy of guessing: a teacher of less has little to teach
HIGH_LOSS = 1000.0  # guessing among n classes has ln(n)
LEAST_SCALE = 1e-8  # of a float16 loss whose gradients are infinite: a larger one would have done long before


def start(opt):
    """Check --ngpu, --save and the files to read, start the workers and join them: the torch.device of this worker.

    Raises ValueError where the flags cannot be followed and OSError where a file that they name is missing.
    """
    workers.check(opt)
    runs.check_files(opt)
    with contextlib.redirect_stdout(None) if workers.launches(opt) else contextlib.nullcontext():
        if rank() == 0:
            runs.check_save(opt)  # what it notes, the first worker tells
    return workers.join(opt)


# -------------------------------------------------------------------------------------------------------- the step


def autocast(device, dtype):
    """Mixed precision for a dtype of `utils.DTYPES`: bfloat16 and float16 compute, float32 parameters and losses."""
    dtype = DTYPES[dtype]
    if dtype in (torch.bfloat16, torch.float16):
        return torch.autocast(device.type, dtype)
    return contextlib.nullcontext()


def make_step(opt, student, teacher, device):
    """The training step as a function: step(images, labels) -> (logits, named losses), unweighted.

    student and teacher are x -> (logits, groups); teacher is None where there is none. Losses are `ce`, with alpha
    `kd`, with beta `at0`, `at1`, ... or `full0`, `full1`, ... by number of the group, or `grad`; and with gamma that of
    the penalty, by its name. With --compile, whole batches take a compiled form of the student and its losses, and on
    GPUs of the teacher.
    """
    learns_gradient = opt.beta > 0 and opt.transfer == 'gradient'
    needs_gradient = learns_gradient or opt.gamma > 0
    compare = full_activation_loss if opt.transfer == 'full' else partial(map_loss, form=opt.at_form)

    def run(network, images):
        with autocast(device, opt.dtype):
            logits, groups = network(images)
        return full(logits), groups

    def teach(images, labels):
        """What the losses take of the teacher, and no more: logits, what is compared of its groups, input gradient."""
        if teacher is None:
            return None, {}, None
        with torch.set_grad_enabled(learns_gradient):
            logits, groups = run(teacher, images)
            gradient = input_gradient(logits, images, labels) if learns_gradient else None
            return logits.detach(), _compared(opt, groups), gradient

    def learn(images, labels, taught_logits, taught, taught_gradient):
        logits, groups = run(student, images)
        terms = {'ce': F.cross_entropy(logits, labels)}
        if opt.alpha:
            terms['kd'] = kd_loss(logits, taught_logits, opt.temperature)
        if needs_gradient:
            j = input_gradient(logits, images, labels, create_graph=True)
        if learns_gradient:
            terms['grad'] = gradient_loss(j, taught_gradient)
        terms |= {name: compare(own, taught[name]) for name, own in _compared(opt, groups).items()}
        if opt.penalty == 'min_l2':
            terms['min_l2'] = gradient_loss(j)
        elif opt.penalty == 'symmetry':
            mirrored = images.detach().flip(3).requires_grad_()
            j_mirrored = input_gradient(run(student, mirrored)[0], mirrored, labels, create_graph=True)
            terms['symmetry'] = gradient_loss(j, j_mirrored.flip(3))
        return logits, terms

    def both(images, labels):
        return learn(images, labels, *teach(images, labels))

    on_whole_batches = _compiled(opt, both, learn, teach, device) if opt.compile else both

    def step(images, labels):
        images = images.detach().requires_grad_(needs_gradient)
        whole = len(images) == opt.batch_size // world()  # another size would have to be compiled for itself
        return (on_whole_batches if whole else both)(images, labels)

    return step


def _compiled(opt, both, learn, teach, device):
    """`both` compiled, but for the teacher on a CPU, which gains nothing there; with --cuda_graphs as graphs."""
    children.import_safely()  # the compiler starts a Python to see what the processor can do
    if device.type == 'cpu':
        compiled = torch.compile(learn, dynamic=False)
        return lambda images, labels: compiled(images, labels, *teach(images, labels))
    if not opt.cuda_graphs:
        return torch.compile(both, dynamic=False)
    replayed = torch.compile(both, dynamic=False, mode='reduce-overhead')

    def replay(images, labels):
        torch.compiler.cudagraph_mark_step_begin()
        logits, terms = replayed(images, labels)
        return logits.clone(), {k: v.clone() for k, v in terms.items()}  # meters keep them, the next replay does not

    return replay


def _compared(opt, groups):
    """What is compared of a network's groups, by the name of the loss: attention maps, or activations (F-ActT)."""
    if not opt.beta or opt.transfer == 'gradient':
        return {}
    chosen = transfer_groups(opt.groups, len(groups))
    if opt.transfer == 'full':
        return {f'full{i}': groups[i] for i in chosen}
    return {f'at{i}': attention_map(groups[i], opt.power, opt.mapping, relative=True) for i in chosen}


def transfer_groups(groups, number):
    """The numbers of the groups that transfer attention, of `number` groups; ValueError for one that is not there."""
    chosen = [int(g) for g in groups.split(',')] if groups else list(range(number))
    if max(chosen) >= number:
        raise ValueError(f'--groups {groups}: the network has groups 0 to {number - 1}')
    return chosen


def prepare(opt, f, params, teacher, image):
    """Pair the networks' groups, and print the student and what beta amounts to; image is (1, 3, H, W).

    Returns the network to train: with --transfer full it has an adapter wherever the channels of student and teacher
    differ, which joins `params`. Raises ValueError where groups cannot be paired.
    """
    by_group = opt.beta > 0 and opt.transfer != 'gradient'
    if by_group:
        with torch.no_grad():
            groups, groups_t = f(image, params, False)[1], teacher(image)[1]
        if len(groups) != len(groups_t):
            raise ValueError(f'the student has {len(groups)} groups, the teacher {len(groups_t)}: no maps to pair')
        chosen = transfer_groups(opt.groups, len(groups))
        if opt.transfer == 'full':
            adapters = place(adapter_params(groups, groups_t, chosen), opt.dtype, image.device)
            set_requires_grad_except_bn_(adapters)
            params.update(adapters)
    if opt.cuda_graphs:
        for value in params.values():
            torch._dynamo.mark_static_address(value)  # it changes in place alone, and graphs need no copy of it
    if rank() == 0:
        print_tensor_dict(params)
    trained = sum(v.numel() for v in without_adapters(params).values() if v.requires_grad)
    say(f'{trained:,} trained parameters')
    if opt.beta and not by_group:
        weight = opt.beta / (2 * opt.batch_size)
        say(f'grad: beta {opt.beta:g} weighs the distance of two input gradients by {weight:.4g}')
    for i in chosen if by_group else ():
        size = [min(s) for s in zip(groups[i].shape[2:], groups_t[i].shape[2:])]
        _say_weight(opt, i, groups_t[i].shape[1], *size)
        if opt.transfer == 'activation' and size == [1, 1]:
            say(f'note: at{i} is of 1x1 maps, which are all equal: it is always 0 and teaches nothing (see --groups)')
    return _adapted(f) if opt.transfer == 'full' else f


def _say_weight(opt, i, channels, height, width):
    if opt.transfer == 'full':
        weight, what = opt.beta / (opt.batch_size * channels * height * width), 'each element of the activations'
        say(f'full{i}: beta {opt.beta:g} weighs {what}, {channels}x{height}x{width}, by {weight:.4g}')
    elif opt.at_form == 'code':
        weight = opt.beta / (opt.batch_size * height * width)
        say(f'at{i}: beta {opt.beta:g} weighs each element of the {height}x{width} maps by {weight:.4g}')
    else:
        weight = opt.beta / (2 * opt.batch_size)
        say(f'at{i}: beta {opt.beta:g} weighs the distance of two {height}x{width} maps by {weight:.4g}')


def _adapted(f):
    def network(x, params, mode, base=''):
        logits, groups = f(x, params, mode, base)
        return logits, adapt(groups, params)

    return network


class Updates:
    """The optimizer of the paper's recipes, as torchnet's Engine takes it; in float16 it scales losses.

    SGD with momentum 0.9 and weight decay on everything that is trained. float16 gradients are computed of a loss that
    is as many times larger as they allow without becoming infinite, or small ones would vanish; a step in which they
    are infinite is left out (Micikevicius et al. 2018, section 3.2; torch.amp.GradScaler).
    """

    def __init__(self, opt, trained, device):
        half = DTYPES[opt.dtype] == torch.float16
        # Fused, a first step that is left out would leave momentum uninitialised (PyTorch 2.14).
        self.sgd = torch.optim.SGD(trained, opt.lr, momentum=0.9, weight_decay=opt.weight_decay, fused=not half)
        self.scaler = torch.amp.GradScaler(device.type, enabled=half)

    def zero_grad(self):
        self.sgd.zero_grad()

    def step(self, closure):
        """Take a step by the gradients that closure() leaves, those of a loss as of `scaled`."""
        closure()
        self.scaler.step(self.sgd)
        self.scaler.update()

    def scaled(self, loss, logits):
        return self.scaler.scale(loss), logits

    def check_scale(self, epoch):
        """FloatingPointError where gradients are infinite at every scale, so that nothing is learnt."""
        if self.scaler.is_enabled() and self.scaler.get_scale() < LEAST_SCALE:
            raise FloatingPointError(f'epoch {epoch}: the gradients in float16 are not finite at any scale; {CALMER}')


def make_update(opt, f, params, teacher, image):
    """A whole training step as `fit` takes it, as a function: update(images, labels), without log and checkpoint.

    f, params: the student. teacher: x -> (logits, groups), or None. image: one such as is trained on, (1, 3, H, W).
    """
    with contextlib.redirect_stdout(None):
        network = partial(prepare(opt, f, params, teacher, image), params=params, mode=True)
    step, meters = make_step(opt, network, teacher, image.device), Meters(image.device, (1,))
    updates = Updates(opt, [v for v in params.values() if v.requires_grad], image.device)

    def update(images, labels):
        sample = images, labels, len(images)
        updates.zero_grad()
        updates.step(lambda: updates.scaled(*weighted_loss(opt, step, sample, 1, meters))[0].backward())
        if len(meters.pending) == FLUSH:
            meters.flush(1)

    return update


def seconds_a_step(opt, f, params, teacher, images, steps=3):
    """How long a training step on images (N, 3, H, W) takes: the median of `steps` after one to warm up."""
    update, times = make_update(opt, f, params, teacher, images[:1]), []
    labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    for _ in range(1 + steps):
        start = time.perf_counter()
        update(images, labels)
        if images.device.type == 'cuda':
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


# ------------------------------------------------------------------------------------------ evaluation and training


def evaluate(f, params, batches, device, dtype='float', topk=(1,), on_batch=lambda: None):
    """Cross entropy and accuracies in percent of a network over batches, every image counted once over all workers.

    Returns (loss, [accuracy for each k of topk]). on_batch() is called after each batch.
    """
    losses, errors = AverageValueMeter(), ClassErrorMeter(list(topk), accuracy=True)

    def network(sample):
        with autocast(device, dtype):
            logits = full(f(sample[0], params, False)[0])
        return F.cross_entropy(logits, sample[1], reduction='sum'), logits

    def on_forward(state):
        losses.add(state['loss'].item(), len(state['sample'][1]))
        errors.add(state['output'].float(), state['sample'][1])
        on_batch()

    engine = Engine()
    engine.hooks['on_forward'] = on_forward
    with torch.no_grad():
        engine.test(network, batches)
    loss, n, *wrong = sum_over_workers([losses.sum, losses.n, *(errors.sum[k] for k in topk)], device)
    return loss / n, [100 * (1 - w / n) for w in wrong]


def evaluate_teacher(name, *network_and_batches):
    """The accuracies that `evaluate` finds, and a note where they are those of guessing.

    Raises ValueError where the logits of the teacher of that name are not finite.
    """
    loss, accuracies = evaluate(*network_and_batches)
    classes = len(network_and_batches[1]['fc.bias'])
    if not math.isfinite(loss):
        raise ValueError(f'{name} cannot teach: its logits on the test images are not finite (cross entropy {loss})')
    if accuracies[0] < LITTLE_MORE * 100 / classes:
        say(f'note: {name} is right on {accuracies[0]:.2f}%, hardly more than by guessing among {classes} classes')
    return accuracies


def place(params, dtype, device):
    """A network's parameters on the device: float64 for --dtype double, float32 for every other."""
    return cast(params, 'double' if DTYPES[dtype] == torch.float64 else 'float', device)


def freeze(params, dtype, device):
    """A teacher's parameters on the device, all but batch norm's in the compute dtype once and for all."""
    params = place(params, dtype, device)
    norms = {k.removesuffix('.running_mean') for k in params if k.endswith('.running_mean')}
    return {k: v if k.rpartition('.')[0] in norms else v.to(DTYPES[dtype]) for k, v in params.items()}


def frozen(opt, f, params, sample, device):
    """A teacher's parameters, folded, in the dtypes of the flags; sample() gives images that int8 is fitted to.

    Raises ValueError for int8 where the device has no such convolutions.
    """
    folded = networks.fold(place(params, opt.dtype, torch.device('cpu')))
    if opt.teacher_dtype == 'int8':
        if device.type != 'cpu' or not torch.backends.mkldnn.is_available():
            raise ValueError('--teacher_dtype int8: only on CPUs, with a PyTorch that has oneDNN')
        return place(folded, 'float', device) | quantize(f, folded, sample())
    return freeze(folded, opt.dtype, device)


def draw(network, opt, num_classes, device):
    """The network to train, `network(num_classes)` drawn from the seed: (f, params) on the device."""
    torch.manual_seed(opt.seed)
    f, params = network(num_classes)
    params = place(params, opt.dtype, device)
    set_requires_grad_except_bn_(params)
    return f, params


def counts(dataset):
    """What a log says of its data."""
    images = {'train_images': len(dataset.train.labels), 'test_images': len(dataset.test.labels)}
    return {'num_classes': dataset.num_classes, **images}


def check_classes(opt, teacher, params, num_classes):
    """Whether a teacher has the classes of the data, so that its accuracy can be tested.

    One of other classes can teach what does not take its logits; that its accuracy is not tested is said. Raises
    ValueError where the flags have its logits teach.
    """
    found = len(params['fc.bias'])
    if found == num_classes:
        return True
    classes = f'{teacher} has {found} output classes, the data set has {num_classes}'
    if opt.beta and opt.transfer == 'gradient':
        raise ValueError(f'{classes}: --transfer gradient differentiates the loss of both by the same labels')
    if opt.alpha:
        raise ValueError(f'{classes}: distillation compares them one by one (--alpha 0 lets it teach attention)')
    say(f'teacher: {classes}; its logits are not used, and its accuracy is not tested')
    return False


def find_teacher(teacher_id):
    """The network and the last log line of a run, named as `runs.find` takes it: (f, params, record).

    Raises OSError where log or model is missing and ValueError where they are damaged or of different networks.
    """
    log, model = runs.find(teacher_id)
    records = read_log(log)
    if not records:
        raise ValueError(f'--teacher_id {teacher_id}: {log} has no line of results')
    f, params = networks.load_teacher(model, (records[-1].get('depth'), records[-1].get('width')), say)
    return f, params, records[-1]


def check_teacher(record, accuracy, same_test_set, teacher_dtype='same'):
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


class Meters:
    """Losses and accuracy of a training epoch; they stay on the device until `flush`."""

    def __init__(self, device, topk):
        self.device, self.topk = device, topk
        self.reset()

    def reset(self):
        self.values = {}
        self.errors = ClassErrorMeter(list(self.topk), accuracy=True)
        self.images = self.steps = self.bad = self.seconds = 0
        self.pending = []
        self.since = time.perf_counter()  # unlike the clock of TimeMeter, it never goes backwards

    def state(self, bad):
        """What has been measured, as numbers; `pending` is empty. bad counts this worker's unreadable images."""
        values = {name: {k: float(v) for k, v in vars(meter).items()} for name, meter in self.values.items()}
        errors = {'n': self.errors.n, 'sum': {int(k): int(n) for k, n in self.errors.sum.items()}}
        mine = {'errors': errors, 'bad': self.bad + bad}
        return {'steps': self.steps, 'images': self.images, 'seconds': self.elapsed(), 'values': values}, mine

    def restore(self, shared, mine):
        """Go on from what `state` returned."""
        self.steps, self.images, self.seconds = shared['steps'], shared['images'], shared['seconds']
        for name, value in shared['values'].items():
            vars(self.values.setdefault(name, AverageValueMeter())).update(value)
        self.errors.n, self.errors.sum = mine['errors']['n'], dict(mine['errors']['sum'])
        self.bad = mine['bad']

    def elapsed(self):
        return self.seconds + time.perf_counter() - self.since

    def add(self, terms, logits, labels, size):
        """Take the parts of this worker: terms sum over workers to the means of the global batch of `size` images."""
        self.names = list(terms)
        self.pending.append((torch.stack([t.detach() for t in terms.values()]), logits.detach(), labels))
        self.images += size

    def flush(self, epoch):
        """Bring what is pending to the meters; FloatingPointError names the first step whose loss is not finite."""
        if not self.pending:
            return
        rows, logits, labels = zip(*self.pending)
        rows = torch.stack(rows)
        if world() > 1:
            dist.all_reduce(rows)
        self.errors.add(torch.cat(logits).float(), torch.cat(labels))
        for row in rows.tolist():
            self.steps += 1
            terms = dict(zip(self.names, row))
            if not all(map(math.isfinite, row)):
                found = ', '.join(f'{k} {v:.4g}' for k, v in terms.items())
                raise FloatingPointError(
                    f'epoch {epoch}, step {self.steps}: the loss is not finite ({found}); {CALMER}'
                )
            for name, value in terms.items():
                self.values.setdefault(name, AverageValueMeter()).add(value)
        self.pending = []

    def accuracy(self):
        n, *wrong = sum_over_workers([self.errors.n, *(self.errors.sum[k] for k in self.topk)], self.device)
        return [100 * (1 - w / n) for w in wrong]


def _resume_(opt, params, trained, updates, topk):
    """Load the checkpoint that --resume names into params and updates; returns its epoch and progress.

    The epoch is the number of whole ones; progress is what the one that was interrupted had come to, or None. The first
    worker alone reads the file and tells the others, who may be on machines that do not see it.
    """
    told = list(_load_run_(opt, params, trained, updates, topk)) if rank() == 0 else [0, None, {}]
    if world() > 1:
        dist.broadcast_object_list(told, 0)
        for value in params.values():
            dist.broadcast(value.detach(), 0)
        for value in trained.values() if told[:2] != [0, None] else ():
            buffer = updates.sgd.state[value].setdefault('momentum_buffer', torch.zeros_like(value))
            dist.broadcast(buffer, 0)
    epoch, progress, scale = told
    if scale and updates.scaler.is_enabled():
        updates.scaler.load_state_dict(scale)
    if progress and world() > 1:
        networks.restore_(_statistics(params), progress['workers'][rank()]['statistics'], opt.resume)
    return epoch, progress


def _load_run_(opt, params, trained, updates, topk):
    path = os.path.join(opt.save, 'model.pt7') if opt.resume == 'auto' else opt.resume
    if not path or (opt.resume == 'auto' and not os.path.exists(path)):
        return 0, None, {}
    state = networks.load(path, say)
    momentum, epoch, progress = (state.get(key) for key in ('optimizer', 'epoch', 'progress'))
    if not isinstance(momentum, dict) or type(epoch) is not int or not isinstance(progress, dict | None):
        raise ValueError(f'{path} holds parameters alone, without momentum and epoch: it can teach, but not be resumed')
    shapes = {k: getattr(v, 'shape', None) for k, v in momentum.items()}
    if epoch < 0 or shapes != {k: v.shape for k, v in trained.items()}:
        raise ValueError(f'{path}: its momentum or epoch does not fit the network')
    scale = state.get('scaler', {})  # empty but for float16, and in older checkpoints
    usual = _types(torch.amp.GradScaler('cpu').state_dict())
    if scale != {} and not (isinstance(scale, dict) and _types(scale) == usual and 0 < scale['scale'] < math.inf):
        raise ValueError(f'{path}: the scale of its float16 losses cannot be read')
    if progress is not None:
        _check_progress(progress, opt, params, path, topk)
    networks.restore_(params, state['params'], path)
    for key, value in trained.items():
        updates.sgd.state[value]['momentum_buffer'] = momentum[key].to(value, copy=True)
    place = f'step {progress["steps"]} of epoch {epoch + 1}' if progress else f'epoch {epoch}'
    say(f'resumed from {path} after {place}')
    return epoch, progress, scale


def _types(values):
    return {k: type(v) for k, v in values.items()}


def _check_progress(progress, opt, params, path, topk):
    """Refuse a position in an epoch that is damaged, or of other batches or another number of workers."""
    meters, shapes = Meters(torch.device('cpu'), topk), {k: v.shape for k, v in _statistics(params).items()}
    try:
        found = [progress['batch_size'], progress['seed'], len(progress['workers'])]
        whole = all(type(v) is int for v in [*found, progress['steps'], progress['images']]) and progress['steps'] >= 0
        if whole and found != [opt.batch_size, opt.seed, world()]:
            flags = '--batch_size {}, --seed {} and {} workers'.format(*found)
            raise ValueError(f'{path} was saved in the middle of an epoch with {flags}: go on with the same')
        for mine in progress['workers']:
            meters.restore(progress, mine)
            if world() > 1:
                networks.check_fit(shapes, mine['statistics'], path)
            whole &= type(meters.bad) is type(meters.errors.n) is int and isinstance(meters.seconds, float)
            whole &= set(meters.errors.sum) == set(topk) and all(type(n) is int for n in meters.errors.sum.values())
        fields, values = set(vars(AverageValueMeter())), progress['values']
        whole &= not progress['steps'] or 'loss' in values
        whole &= all(set(v) == fields and all(type(n) is float for n in v.values()) for v in values.values())
    except (AttributeError, KeyError, TypeError):
        whole = False
    if not whole:
        raise ValueError(f'{path}: its position in the epoch cannot be read')


def _statistics(params):
    return {k: v for k, v in params.items() if k.endswith(STATISTICS)}


def fit(opt, step, f, params, train_batches, test_batches, device, facts, topk=(1,)):
    """Train for opt.epochs, keeping log and checkpoint in opt.save; returns the last epoch's record.

    step: as of `make_step`. f, params: the network that is trained, evaluated and saved. train_batches(epoch, start)
    and test_batches() give iterables as of `data`. facts: what else belongs in every line of the log. Accuracies are
    logged as a number, or as a list where topk names several.
    Raises Stopped where a signal asked for it, FloatingPointError for a loss or parameter that is not finite,
    ValueError where another process trains into --save and OSError where it cannot be written.
    """
    with runs.locked(opt), Requests() as requests:
        trained = {k: v for k, v in params.items() if v.requires_grad}
        updates = Updates(opt, trained.values(), device)
        done, progress = _resume_(opt, params, trained, updates, topk)
        if done >= opt.epochs:
            return say(f'nothing to do: {done} of {opt.epochs} epochs are done')
        runs.open_run(opt, done)
        facts = {**vars(opt), **facts, 'n_parameters': num_trained(params), **environment(device)}
        run = _Run(opt, f, params, trained, updates, requests, Meters(device, topk), done, progress)
        engine = Engine()
        engine.hooks = _hooks(run, f, train_batches, test_batches, device, facts, topk)

        def network(sample):
            return updates.scaled(*weighted_loss(opt, step, sample, run.epoch, run.meters))

        engine.train(network, None, opt.epochs, updates)
    if opt.save:
        say(f'log: {os.path.join(opt.save, "log.txt")}\nmodel: {os.path.join(opt.save, "model.pt7")}')
    return run.record


class _Run:
    """A training: what it changes, and where it is."""

    def __init__(self, opt, f, params, trained, updates, requests, meters, done, progress):
        self.f, self.images = f, None  # images: the batch of the last step
        self.opt, self.params, self.trained, self.updates = opt, params, trained, updates
        self.requests, self.meters, self.epoch, self.progress = requests, meters, done, progress
        self.record, self.batches, self.saved_at, self.warned = None, None, time.monotonic(), False

    def begin_epoch(self, epoch):
        """Set the rate and the meters; returns how many of its batches are done."""
        progress, self.progress, self.epoch = self.progress, None, epoch
        self.meters.reset()
        if progress:
            self.meters.restore(progress, progress['workers'][rank()])
        _set_rate_(self.opt, self.updates.sgd, epoch, begins=not progress)
        return self.meters.steps

    def pause(self, alone=False):
        """Save if it is time to, and stop if a signal asked for it: all workers together, or `alone` the only one."""
        due = 0 < self.opt.save_every * 60 < time.monotonic() - self.saved_at
        wishes = [self.requests.signum, int(due)]
        if world() > 1:
            if alone:
                return
            wishes = torch.tensor(wishes, device=self.meters.device)
            dist.all_reduce(wishes, dist.ReduceOp.MAX)
            wishes = wishes.tolist()
        signum, due = wishes
        if signum or due:
            self.meters.flush(self.epoch)
            self.save()
        if signum:
            advice = 'go on with --resume auto' if self.opt.save else 'nothing is kept without --save'
            raise Stopped(signum, f'stopped after step {self.meters.steps} of epoch {self.epoch}; {advice}')

    def save(self):
        """Save in the middle of an epoch: its progress, which is in part every worker's own, is saved too."""
        self.check_finite()
        shared, mine = self.meters.state(getattr(self.batches, 'bad', 0))
        if world() > 1:
            mine['statistics'] = {k: v.cpu() for k, v in _statistics(self.params).items()}
        everyone = [mine]
        if world() > 1:
            everyone = [None] * world()
            dist.all_gather_object(everyone, mine)
        batches = {'batch_size': self.opt.batch_size, 'seed': self.opt.seed}
        self.keep({**shared, **batches, 'workers': everyone}, self.epoch - 1)

    def check_finite(self):
        """FloatingPointError, in all workers, where the last updates have spoilt something in any of them."""
        self.updates.check_scale(self.epoch)
        spoilt = [self.spoilt()]
        if world() > 1:
            spoilt = [None] * world()
            dist.all_gather_object(spoilt, self.spoilt())
        if any(spoilt):
            what = next(filter(None, spoilt))
            raise FloatingPointError(
                f'epoch {self.epoch}, step {self.meters.steps}: {what} became infinite or NaN; {CALMER}'
            )

    def spoilt(self):
        """What is not finite of this worker's parameters, their momentum and the network's output; '' where all is."""
        momentum = {f'the momentum of {k}': m for k, m in self.momentum().items()}
        values = {**{k: v.detach() for k, v in self.params.items()}, **momentum}
        finite = torch.stack([v.isfinite().all() for v in values.values()]).tolist()
        wrong = [k for k, good in zip(values, finite) if not good]
        if wrong:
            return wrong[0] + (f' and {len(wrong) - 1} others' if len(wrong) > 1 else '')
        if self.images is None:
            return ''
        with torch.no_grad(), autocast(self.meters.device, self.opt.dtype):
            logits = self.f(self.images, self.params, False)[0]
        return '' if logits.isfinite().all() else 'the output of the network'

    def momentum(self):
        """The momentum of what is trained: {name: tensor}."""
        state = self.updates.sgd.state
        return {k: state[v].get('momentum_buffer', torch.zeros_like(v)).detach() for k, v in self.trained.items()}

    def keep(self, progress, epochs):
        """Replace the checkpoint; `check_finite` comes before."""
        self.saved_at = time.monotonic()
        if not self.opt.save or rank():
            return
        state = {
            'params': {k: v.detach() for k, v in self.params.items()},
            'optimizer': self.momentum(),
            'scaler': self.updates.scaler.state_dict(),
            'epoch': epochs,
            'progress': progress,
        }
        save(os.path.join(self.opt.save, 'model.pt7'), state)


def _hooks(run, f, train_batches, test_batches, device, facts, topk):
    """What torchnet's Engine calls in the course of a training."""
    opt, meters = run.opt, run.meters

    def on_start(state):
        state['epoch'] = run.epoch

    def on_start_epoch(state):
        start = run.begin_epoch(state['epoch'] + 1)
        run.batches = train_batches(run.epoch, start)
        state['iterator'] = state['bar'] = _bar(run.batches, f'epoch {run.epoch}/{opt.epochs}', start)

    def on_update(state):
        run.images = state['sample'][0]
        if len(meters.pending) == FLUSH:
            meters.flush(run.epoch)
            speed = meters.images / meters.elapsed()
            state['bar'].set_postfix_str(f'loss {meters.values["loss"].value()[0]:.4f}, {speed:.0f} images/s')
            run.pause()
        elif run.requests.signum:
            run.pause(alone=True)

    def on_end_epoch(state):
        meters.flush(run.epoch)
        run.pause()
        trained_for = meters.elapsed()
        join_statistics_(run.params)
        tested_since, batches = time.perf_counter(), test_batches()
        tested = evaluate(f, run.params, batches, device, opt.dtype, topk, lambda: run.pause(alone=True))
        if not math.isfinite(tested[0]):
            raise FloatingPointError(f'epoch {run.epoch}: the test loss is not finite ({tested[0]}); {CALMER}')
        run.record = {
            **facts,
            **_results(opt, run.epoch, meters, trained_for, tested, time.perf_counter() - tested_since),
        }
        if hasattr(batches, 'bad'):
            bad = meters.bad + run.batches.bad + batches.bad
            run.record['bad_images'] = int(sum_over_workers([bad], device)[0])
        _keep(run)
        _print_epoch(opt, run.record, meters)
        if tested[0] > HIGH_LOSS and not run.warned:
            say(f'note: a test loss of {tested[0]:.3g} is far above that of guessing: the run may diverge; {CALMER}')
            run.warned = True

    return {h.__name__: h for h in (on_start, on_start_epoch, on_update, on_end_epoch)}


def _bar(batches, name, start):
    """A progress bar over the batches that are left, shown by the first worker on a terminal."""
    total = start + len(batches)
    return tqdm(batches, name, total, initial=start, unit='step', leave=False, disable=True if rank() else None)


def weighted_loss(opt, step, sample, epoch, meters):
    """What this worker differentiates, and the logits; the named terms go to the meters.

    Gradients are averaged over workers, so the loss of a share counts by its part of the global batch.
    """
    images, labels, size = sample
    logits, terms = step(images, labels)
    weights = {'ce': 1 - opt.alpha, 'kd': opt.alpha, opt.penalty: opt.gamma}
    beta = beta_at(epoch, opt.epochs, opt.beta, opt.beta_decay)
    total = sum(weights.get(name, beta) * term for name, term in terms.items())
    part = len(labels) / size
    meters.add({name: term.detach() * part for name, term in {'loss': total, **terms}.items()}, logits, labels, size)
    return total * (part * world()), logits


def _set_rate_(opt, optimizer, epoch, begins=True):
    """Give the optimizer an epoch's learning rate; momentum starts from zero where it drops, as in the original."""
    epoch_step = json.loads(opt.epoch_step)
    for group in optimizer.param_groups:
        group['lr'] = lr_at(epoch, opt.lr, epoch_step, opt.lr_decay_ratio)
    if begins and epoch in epoch_step:
        optimizer.state.clear()


def _results(opt, epoch, meters, train_time, tested, test_time):
    """What an epoch adds to the log."""
    values = {name: meter.value() for name, meter in meters.values.items()}
    return {
        'epoch': epoch,
        'train_loss': values['loss'][0],
        'train_acc': _one_or_list(meters.accuracy()),
        'test_loss': tested[0],
        'test_acc': _one_or_list(tested[1]),
        'train_time': train_time,
        'test_time': test_time,
        'at_losses': [v for k, v in values.items() if k.startswith('at')],
        **{k: v[0] for k, v in values.items() if k != 'loss'},
        'lr': lr_at(epoch, opt.lr, json.loads(opt.epoch_step), opt.lr_decay_ratio),
        'beta_now': beta_at(epoch, opt.epochs, opt.beta, opt.beta_decay),
        'images_per_second': meters.images / train_time,
    }


def _one_or_list(accuracies):
    return accuracies[0] if len(accuracies) == 1 else accuracies


def _percent(accuracy):
    return ' '.join(f'{a:.2f}%' for a in (accuracy if isinstance(accuracy, list) else [accuracy]))


def _keep(run):
    """Append the log line, then replace the checkpoint: between the two, a resume repeats the epoch and its line."""
    run.check_finite()
    if run.opt.save and rank() == 0:
        runs.append_line(os.path.join(run.opt.save, 'log.txt'), runs.line_of(run.record))
    run.keep(None, run.epoch)


def _print_epoch(opt, record, meters):
    terms = '  '.join(f'{k} {record[k]:.3g}' for k in meters.values if k != 'loss')
    say(
        f'epoch {record["epoch"]}/{opt.epochs}  lr {record["lr"]:.3g}  '
        f'train {record["train_loss"]:.4f} {_percent(record["train_acc"])}  '
        f'test {record["test_loss"]:.4f} {_percent(record["test_acc"])}  {terms}  '
        f'{record["images_per_second"]:.0f} images/s  {record["train_time"]:.0f}+{record["test_time"]:.0f} s'
    )


def environment(device):
    """What a run ran on, for its log."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else _processor()
    return {'torch': torch.__version__, 'device': name, 'workers': world(), 'commit': runs.commit()}


def _processor():
    try:
        with open('/proc/cpuinfo', encoding='utf-8', errors='replace') as file:
            model = next((line.split(':')[1].strip() for line in file if line.startswith('model name')), 'CPU')
    except OSError:
        model = 'CPU'
    return f'{model}, {torch.get_num_threads()} threads'
