"""float16 with its scale, float64, and the order of weights in memory."""

from functools import partial

import pytest
import torch
from conftest import refused

import resnet
from engine import resume
from engine.flags import parse_cifar
from engine.loop import Data
from engine.step import Updates, make_update
from engine.student import Network
from engine.teacher import frozen
from formats import networks, write

HALF = [
    '--beta 1e5',
    '--transfer gradient --beta 1',
    '--transfer full --beta 1e7',
    '--penalty symmetry --gamma 100',
]


@pytest.mark.slow
@pytest.mark.parametrize('words', HALF)
def test_a_weight_that_float32_bears_is_borne_by_float16(words):
    """Its gradients are infinite at first, and those steps are left out."""
    losses = {}
    for dtype in ('float', 'half'):
        opt = parse_cifar('', f'--teacher_id x --batch_size 32 --lr 1e-4 --dtype {dtype} {words}'.split())
        torch.manual_seed(0)
        f, params = resnet.wide_resnet(10, 0.25, 10)
        g, fixed = resnet.wide_resnet(10, 0.5, 10)
        taught = partial(g, params={k: v.detach() for k, v in fixed.items()}, mode=False)
        images, labels = torch.randn(32, 3, 16, 16), torch.arange(32) % 10
        update, before = make_update(opt, Network(f, params), taught, images[:1]), params['fc.weight'].detach().clone()
        for _ in range(30):
            update(images, labels)
        assert not torch.equal(params['fc.weight'], before)
        losses[dtype] = params['fc.weight'].detach()
        assert losses[dtype].isfinite().all()


def test_the_scale_of_float16_losses_is_resumed(train):
    flags = '--epochs 3 --epoch_step [] --lr 0.01 --dtype half'
    assert train(flags, '--save logs/whole')[0] == 0
    assert train('--epochs 1 --epoch_step [] --lr 0.01 --dtype half --save logs/part')[0] == 0
    state = networks.load('logs/part/model.pt7')
    assert state['scaler']['scale'] > 0 and state['scaler']['_growth_tracker'] == 4  # steps of an epoch
    assert train(flags, '--save logs/part --resume auto')[0] == 0
    whole, part = (networks.load(f'logs/{name}/model.pt7') for name in ('whole', 'part'))
    assert whole['scaler'] == part['scaler'] and whole['scaler']['_growth_tracker'] == 12
    assert all(torch.equal(whole['params'][k], part['params'][k]) for k in whole['params'])
    write.save('logs/part/model.pt7', {**state, 'scaler': {'scale': 'x'}})
    assert refused(train(flags, '--save logs/part --resume logs/part/model.pt7'), 'scale of its float16 losses')


def test_gradients_that_no_scale_makes_finite_fail_the_run():
    opt = parse_cifar('', ['--dtype', 'half'])
    weight = torch.ones(1, requires_grad=True)
    updates = Updates(opt, [weight], torch.device('cpu'))

    def closure():
        updates.zero_grad()
        updates.scaled(weight * float('inf'), None)[0].backward()

    for _ in range(100):
        updates.step(closure)
    assert weight == 1
    with pytest.raises(FloatingPointError, match='epoch 3: the gradients in float16 are not finite at any scale'):
        updates.check_scale(3)


def test_a_float64_teacher_is_folded_in_float64():
    opt = parse_cifar('', ['--dtype', 'double'])
    torch.manual_seed(0)
    f, params = resnet.wide_resnet(10, 0.5, 10)
    params = {k: v.detach() + 0.1 for k, v in params.items()}
    folded = frozen(opt, Network(f, params), None, torch.device('cpu'))
    x = torch.randn(2, 3, 16, 16, dtype=torch.double)
    expected = f(x, {k: v.double() for k, v in params.items()}, False)[0]
    torch.testing.assert_close(f(x, folded, False)[0], expected, rtol=1e-12, atol=1e-12)


def test_a_resumed_momentum_has_the_strides_of_its_weight_and_files_are_contiguous(tmp_path):
    """A fused optimizer would otherwise pair wrong values, without an error."""
    opt = parse_cifar('', ['--resume', str(tmp_path / 'model.pt7')])
    weight, gradients = torch.randn(4, 3, 2, 2), torch.randn(2, 4, 3, 2, 2)

    def begin():
        params = {'conv': weight.clone(memory_format=torch.channels_last).requires_grad_()}
        return params, Updates(opt, params.values(), torch.device('cpu'))

    def step(params, updates, gradient):
        params['conv'].grad = torch.empty_like(params['conv']).copy_(gradient)
        updates.step(lambda: None)

    whole, part = begin(), begin()
    for run in (whole, part):
        step(*run, gradients[0])
    data = Data(None, None, {'classes': ['a']}, torch.zeros(1, 3, 8, 8))
    write.save(opt.resume, resume.state_of(*part, 1, None, data))
    saved = networks.load(opt.resume)
    assert saved['params']['conv'].is_contiguous()
    assert saved['optimizer']['state'][0]['momentum_buffer'].is_contiguous()
    part = begin()
    resume.resume_(opt, *part, data)
    for run in (whole, part):
        step(*run, gradients[1])
    assert torch.equal(part[0]['conv'], whole[0]['conv']) and part[0]['conv'].stride() == (12, 1, 6, 3)
