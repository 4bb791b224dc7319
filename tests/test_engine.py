"""The loop against a hand-written loop, schedules, evaluation and the log."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import resnet
import utils
from engine import schedules
from engine.arguments import Parser
from engine.evaluate import evaluate
from engine.flags import common_flags
from engine.log import read_log
from engine.step import make_step
from engine.student import Network, pair
from engine.transfer import group_numbers
from formats import networks
from images import memory
from nin import nin

CPU = torch.device('cpu')


def test_learning_rate_drops_at_the_start_of_the_named_epochs():
    rates = [schedules.lr_at(epoch, 0.1, [2, 4], 0.2) for epoch in range(1, 6)]
    assert rates == pytest.approx([0.1, 0.02, 0.02, 0.004, 0.004])
    assert schedules.lr_at(200, 0.1, [60, 120, 160], 0.2) == pytest.approx(0.0008)


def test_beta_stays_or_falls_to_zero():
    assert [schedules.beta_at(e, 4, 1000, 'none') for e in (1, 4)] == [1000, 1000]
    assert [schedules.beta_at(e, 4, 1000, 'linear') for e in (1, 2, 3, 4, 5)] == [1000, 750, 500, 250, 0]
    cosine = [schedules.beta_at(e, 4, 1000, 'cosine') for e in (1, 2, 3, 4, 5)]
    assert cosine == pytest.approx([1000, 500 + 250 * 2**0.5, 500, 500 - 250 * 2**0.5, 0])


@pytest.mark.parametrize('keep', [False, True])
def test_fit_equals_a_loop_written_out_by_hand(train, photos, tmp_path, keep):
    """AT + KD with decaying beta and two drops of the rate, each with a new optimizer and zero momentum, or not."""
    teacher = '--epochs 2 --epoch_step [2] --lr 0.05'
    assert train(teacher, '--save logs/teacher')[0] == 0
    flags = '--teacher_id teacher --alpha 0.7 --beta 50 --beta_decay linear --temperature 3 --seed 5 --epochs 3'
    flags += ' --keep_momentum' * keep
    assert train(flags, '--epoch_step [2,3] --lr 0.05 --weight_decay 0.01 --save logs/student')[0] == 0

    images = memory.load('folder', photos, image_size=16).train
    torch.manual_seed(5)
    f, params = resnet.wide_resnet(10, 0.25, 3)
    g, fixed = networks.load_teacher('logs/teacher/model.pt7')
    trained = [v for v in params.values() if v.requires_grad]
    losses = []
    for epoch, lr in ((1, 0.05), (2, 0.01), (3, 0.002)):
        if epoch == 1 or not keep:
            optimizer = torch.optim.SGD(trained, lr, momentum=0.9, weight_decay=0.01)
        optimizer.param_groups[0]['lr'] = lr
        total, steps = 0, 0
        for x, labels, _ in memory.TrainBatches(images, 16, 2, True, 5, 0, 1, epoch):
            y, groups = f(x, params, True)
            with torch.no_grad():
                y_t, groups_t = g(x, fixed, False)
            at = sum(utils.at_loss(a, b) for a, b in zip(groups, groups_t))
            loss = utils.distillation(y, y_t, labels, 3, 0.7) + 50 * (1 - (epoch - 1) / 3) * at
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total, steps = total + loss.item(), steps + 1
        losses.append(total / steps)
    saved = networks.load('logs/student/model.pt7')['params']
    for key, value in params.items():
        torch.testing.assert_close(saved[key], value.detach(), rtol=1e-5, atol=1e-6)
    records = read_log('logs/student/log.txt')
    assert [r['train_loss'] for r in records] == pytest.approx(losses, rel=1e-5)
    assert [r['lr'] for r in records] == [0.05] * 3
    assert [r['lr_now'] for r in records] == pytest.approx([0.05, 0.01, 0.002])
    assert [r['beta_now'] for r in records] == pytest.approx([50, 100 / 3, 50 / 3])


def test_evaluation_counts_every_image_once_whatever_the_batches():
    torch.manual_seed(0)
    f, params = resnet.wide_resnet(10, 0.25, 10)
    images = memory.load('digits', image_size=8).test
    images = memory.Images(images.pixels[:101], images.labels[:101])
    logits = f(memory.normalize(images.pixels), params, False)[0].detach()
    wrong = (logits.argmax(1) != images.labels).sum().item()
    for batch_size in (101, 25, 7):
        loss, (accuracy,) = evaluate(Network(f, params), memory.TestBatches(images, batch_size), CPU)
        assert accuracy == pytest.approx(100 * (1 - wrong / 101), abs=1e-9)
        assert loss == pytest.approx(F.cross_entropy(logits, images.labels).item(), rel=1e-5)
    top2 = evaluate(Network(f, params), memory.TestBatches(images, 25), CPU, topk=(1, 2))[1]
    second = (logits.topk(2)[1] == images.labels[:, None]).any(1).double().mean().item()
    assert top2 == pytest.approx([accuracy, 100 * second])


def flags(words):
    parser = Parser('')
    recipe = {'depth': 10, 'batch_size': 4, 'epochs': 1, 'epoch_step': '[]', 'lr_decay_ratio': 1, 'weight_decay': 0}
    common_flags(parser, '4.1', **recipe)
    return parser.parse_args(words.split())


@pytest.mark.parametrize(
    'words, names',
    [
        ('', 'ce'),
        ('--beta 1', 'ce at0 at1 at2'),
        ('--alpha 0.5', 'ce kd'),
        ('--beta 1 --transfer full --groups 2,0', 'ce full2 full0'),
        ('--beta 1 --transfer gradient --alpha 0.5', 'ce kd grad'),
        ('--penalty symmetry --gamma 1', 'ce symmetry'),
        ('--penalty min_l2 --gamma 1 --beta 1', 'ce at0 at1 at2 min_l2'),
    ],
)
def test_step_names_its_terms_and_computes_no_other(words, names):
    f, params = resnet.wide_resnet(10, 0.25, 10)
    network = partial(f, params=params, mode=True)
    step = make_step(flags(words), network, network, CPU)
    logits, losses = step(torch.randn(4, 3, 8, 8), torch.arange(4))
    assert list(losses.named()) == names.split() and logits.shape == (4, 10)


def image_gradient(f, params, mode, images, labels):
    """The gradient of the summed cross entropy by each pixel, from central differences."""
    gradient, eps = torch.zeros_like(images), 1e-6

    def loss(x):
        return F.cross_entropy(f(x, params, mode)[0], labels, reduction='sum').item()

    for i in range(images.numel()):
        shift = torch.zeros(images.numel(), dtype=images.dtype)
        shift[i] = eps
        shift = shift.reshape(images.shape)
        gradient.view(-1)[i] = (loss(images + shift) - loss(images - shift)) / (2 * eps)
    return gradient


NETWORKS = {
    'wide ResNet in training mode': lambda: resnet.wide_resnet(10, 1 / 16, 4),
    'NIN in training mode': lambda: nin(1 / 32, 4),
    'NIN without batch norm': lambda: nin(1 / 32, 4, no_bn=True),
}


@pytest.mark.parametrize('network', NETWORKS)
@pytest.mark.parametrize(
    'words', ['--beta 1 --transfer gradient', '--penalty symmetry --gamma 1', '--penalty min_l2 --gamma 1']
)
def test_losses_of_gradients_equal_finite_differences(network, words):
    """Their values equal differences of the cross entropy, and their gradients differences of their values."""
    torch.manual_seed(0)
    f, params = NETWORKS[network]()
    g, fixed = nin(1 / 32, 4)
    params, fixed = ({k: v.detach().double() for k, v in p.items()} for p in (params, fixed))
    images, labels = torch.randn(3, 3, 5, 5, dtype=torch.float64), torch.tensor([0, 2, 3])
    opt = flags(words + ' --dtype double')
    trained = [v.requires_grad_() for k, v in params.items() if 'running' not in k]

    def term():
        step = make_step(opt, partial(f, params=params, mode=True), partial(g, params=fixed, mode=False), CPU)
        return list(step(images, labels)[1].named().values())[1]

    value = term()
    with torch.no_grad():
        j = image_gradient(f, params, True, images, labels)
        if opt.transfer == 'gradient':
            j = j - image_gradient(g, fixed, False, images, labels)
        if opt.penalty == 'symmetry':
            j = j - image_gradient(f, params, True, images.flip(3), labels).flip(3)
    expected = sum(v.norm().item() for v in j) / len(j) / 2
    assert expected > 1e-3 and value.item() == pytest.approx(expected, rel=1e-5)

    assert_gradient(term, trained)


def assert_gradient(term, trained):
    """Compare the gradient of term() with differences of its values, along four random directions."""
    gradients = torch.autograd.grad(term(), trained, allow_unused=True, materialize_grads=True)
    for seed in range(4):
        torch.manual_seed(seed)
        ways, eps = [torch.randn_like(v) for v in trained], 1e-7
        along = sum((a * b).sum() for a, b in zip(gradients, ways)).item()
        values = []
        for sign in (1, -2, 1):  # forward, to the other side, and back
            with torch.no_grad():
                torch._foreach_add_(trained, ways, alpha=sign * eps)
            values.append(term().item())
        assert along == pytest.approx((values[0] - values[1]) / (2 * eps), rel=1e-4, abs=1e-6)


def np_transfer(opt, x, y, adapter):
    """The activation transfer term of one group, computed from its formula on numpy activations (N, C, H, W)."""
    if opt.transfer == 'full':
        x, y = (x if adapter is None else np.einsum('oc,nchw->nohw', adapter, x)), y
    else:
        powers = [abs(a) ** opt.power for a in (x, y)]
        x, y = (p.sum(1) if opt.mapping == 'sum' else p.max(1) for p in powers)
    x, y = ([v.ravel() / np.sqrt((v**2).sum()) for v in a] for a in (x, y))
    if opt.at_form == 'paper':
        return sum(np.sqrt(((a - b) ** 2).sum()) for a, b in zip(x, y)) / len(x) / 2
    return sum(((a - b) ** 2).mean() for a, b in zip(x, y)) / len(x)


def np_kd(temperature, y, y_t):
    p, q = (np.exp(a / temperature) / np.exp(a / temperature).sum(1, keepdims=True) for a in (y, y_t))
    return temperature**2 * (q * np.log(q / p)).sum() / len(y)


@pytest.mark.parametrize(
    'words, groups',
    [
        ('', [0, 1, 2]),
        ('--power 1', [0, 1, 2]),
        ('--power 4', [0, 1, 2]),
        ('--mapping max --power 1', [0, 1, 2]),
        ('--mapping max --power 2', [0, 1, 2]),
        ('--mapping max --power 4', [0, 1, 2]),
        ('--at_form paper', [0, 1, 2]),
        ('--groups 1', [1]),
        ('--transfer full', [0, 1, 2]),
        ('--transfer full --groups 2,1 --alpha 0.9 --temperature 3', [2, 1]),
    ],
)
def test_losses_of_activations_equal_their_formulas_and_finite_differences(words, groups):
    """In float64, for a wide ResNet in training mode with batch norm; its teacher's last group is thinner."""
    torch.manual_seed(0)
    f, params = resnet.wide_resnet(10, 3 / 8, 4)
    g, fixed = nin(1 / 16, 4, no_bn=True)
    params, fixed = ({k: v.detach().double() for k, v in p.items()} for p in (params, fixed))
    utils.set_requires_grad_except_bn_(params)
    images, labels = torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 2, 3])
    opt = flags(f'--beta 1 --dtype double {words}')
    teacher = partial(g, params=fixed, mode=False)
    student = partial(pair(opt, Network(f, params), teacher, images[:1]), params=params, mode=True)
    step = make_step(opt, student, teacher, CPU)
    terms = {k: v.item() for k, v in step(images, labels)[1].named().items()}

    with torch.no_grad():
        (y, xs), (y_t, ys) = f(images, params, True), teacher(images)
    assert [len(a[0]) for a in xs] == [6, 12, 24] and [len(b[0]) for b in ys] == [6, 12, 12]
    adapters = {i: params[f'adapter.{i}'].detach()[:, :, 0, 0].numpy() for i in groups if f'adapter.{i}' in params}
    name = 'full' if opt.transfer == 'full' else 'at'
    expected = {f'{name}{i}': np_transfer(opt, xs[i].numpy(), ys[i].numpy(), adapters.get(i)) for i in groups}
    if opt.alpha:
        expected['kd'] = np_kd(opt.temperature, y.numpy(), y_t.numpy())
    expected['ce'] = F.cross_entropy(y, labels).item()
    assert terms == pytest.approx(expected, rel=1e-9) and min(expected.values()) > 1e-5
    trained = [v for v in params.values() if v.requires_grad]
    assert_gradient(lambda: step(images, labels)[1].total(opt.beta, opt.gamma), trained)


def test_transfer_groups_are_chosen_by_number():
    assert group_numbers('', 3) == [0, 1, 2] and group_numbers('2,0', 3) == [2, 0]
    with pytest.raises(ValueError, match='--groups 3: the network has groups 0 to 2'):
        group_numbers('3', 3)
