"""The table of transfer methods: the losses it names are those that train, and a new method is one new line."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import cifar
import utils
from engine import series, transfer
from engine.log import read_log


@pytest.fixture
def teacher(train):
    assert train('--epochs 1 --save logs/teacher')[0] == 0


def first_losses(train, *flags):
    status, _, err = train('--epochs 1 --lr 0.01 --teacher_id teacher --save logs/run --overwrite', *flags)
    assert status == 0, err
    return read_log('logs/run/log.txt')[0]


@pytest.mark.parametrize(
    'name, flags, term',
    [
        ('at_loss', '--beta 10', 'at0'),
        ('at', '--beta 10', None),
        ('full_activation_loss', '--beta 10 --transfer full', 'full0'),
        ('gradient_loss', '--beta 1 --transfer gradient', 'grad'),
        ('kd_loss', '--alpha 0.5', 'kd'),
        ('distillation', '--alpha 0.5', None),
        ('gradient_loss', '--penalty symmetry --gamma 1', 'symmetry'),
        ('gradient_loss', '--penalty min_l2 --gamma 1', 'min_l2'),
    ],
)
def test_the_losses_of_utils_are_those_that_train(train, teacher, monkeypatch, name, flags, term):
    """If a loss is doubled, the first step logs twice its value, and training gives other parameters."""
    loss = getattr(utils, name)
    small = '--batch_size 60'  # one step an epoch
    before = first_losses(train, flags, small)
    monkeypatch.setattr(utils, name, lambda *arguments, **named: 2 * loss(*arguments, **named))
    after = first_losses(train, flags, small)
    if term:
        assert after[term] == pytest.approx(2 * before[term], rel=1e-6)
    assert after['train_loss'] > before['train_loss'] and after['test_loss'] != before['test_loss']
    monkeypatch.setattr(utils, name, lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train('--epochs 1 --teacher_id teacher', flags)


def selectivity(x, y, opt):
    """Squared maximum mean discrepancy of neurons' patterns, with a kernel x^2 (Huang & Wang 2017)."""
    x, y = (F.normalize(v.flatten(2), dim=2) for v in (x, y))  # (N, C, H, W) -> (N, C, H*W)
    pairs = [(a @ b.transpose(1, 2)).square().mean() for a, b in ((x, x), (y, y), (x, y))]
    return pairs[0] + pairs[1] - opt.share * pairs[2]


NST = transfer.Transfer(
    term='nst',
    title='neuron selectivity',
    paper='Huang & Wang 2017',
    label='NST',
    loss=selectivity,
    weighs=lambda opt, channels, height, width: (opt.beta, f'the discrepancy of {channels} channels'),
    flags={'share': {'default': 2.0, 'type': float, 'help': 'of the pairs'}},
)


def test_a_new_method_is_one_function_and_one_line(train, teacher, monkeypatch):
    """With its flag in --help and its check, its name in the log, its weight in the output and a curve in the plot."""
    monkeypatch.setitem(transfer.TRANSFERS, 'selectivity', NST)
    words = ' '.join(train('--help')[1].split())
    assert 'selectivity: neuron selectivity (Huang & Wang 2017)' in words and '--share' in words
    flags = '--epochs 2 --epoch_step [] --lr 0.05 --teacher_id teacher --transfer selectivity --beta 5 --save logs/nst'
    status, out, err = train(flags)
    assert status == 0, err
    assert out.count('beta 5 weights the discrepancy of') == 3 and 'nst0: beta 5' in out
    first, last = read_log('logs/nst/log.txt')
    assert all(0 < last[term] for term in ('nst0', 'nst1', 'nst2')) and last['train_loss'] < first['train_loss']
    assert list(series.loss_terms(series.read_run('logs/nst'))) == ['ce', 'nst0', 'nst1', 'nst2']
    status, _, err = train('--teacher_id teacher --beta 5 --share 3')
    assert status == 2 and '--share belongs to --transfer selectivity alone, not to --transfer activation' in err


def test_every_line_of_the_tables_is_told_apart_and_explained():
    rows = [*transfer.TRANSFERS.values(), *transfer.PENALTIES.values()]
    names = [*(row.term for row in transfer.TRANSFERS.values()), *transfer.PENALTIES, 'ce', 'kd']
    assert not any(a.startswith(b) for a, b in itertools.permutations(names, 2))  # a group's number follows a term
    assert all(row.title and row.paper and row.label for row in rows)
    assert len({row.label for row in rows}) == len(rows)


def test_a_map_of_the_teacher_is_all_that_attention_transfer_keeps():
    torch.manual_seed(0)
    x, y = torch.randn(2, 5, 4, 4), torch.randn(2, 7, 8, 8)
    opt = cifar.flags.parse_cifar('', '--teacher_id x --beta 1 --power 3'.split())
    kept = transfer.TRANSFERS['activation'].keep(y, opt)
    assert kept.shape == (2, 8, 8)
    assert torch.equal(utils.at_loss(x, kept, 3), utils.at_loss(x, y, 3))


def test_a_teacher_without_a_weight_teaches_nothing_which_is_said(train, teacher):
    words, runs = '--epochs 1 --seed 3', {}
    for name, more in (('alone', ''), ('taught', '--teacher_id teacher')):
        status, out, err = train(f'{words} {more} --save logs/{name}')
        assert status == 0 and ('the teacher teaches nothing: neither --alpha nor --beta' in out) == bool(more), err
        runs[name] = torch.load(f'logs/{name}/model.pt7')['params']
    assert all(torch.equal(value, runs['taught'][key]) for key, value in runs['alone'].items())
