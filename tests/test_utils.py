"""The losses against numpy in float64 and finite differences; the parameters against the authors' distributions."""

import math

import numpy as np
import pytest
import torch

import utils

rng = np.random.default_rng(7)
X = rng.standard_normal((3, 5, 4, 6))
Y = rng.standard_normal((3, 7, 4, 6))


def np_map(x, p=2, mapping='sum'):
    powers = np.abs(x) ** p
    return powers.sum(1) if mapping == 'sum' else powers.max(1)


def np_at(q):
    q = q.reshape(len(q), -1)
    return q / np.sqrt((q**2).sum(1, keepdims=True))


def np_softmax(y):
    e = np.exp(y - y.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def tensor(x, grad=False):
    return torch.tensor(x, dtype=torch.float64, requires_grad=grad)


@pytest.mark.parametrize('mapping', ['sum', 'max'])
@pytest.mark.parametrize('p', [1, 1.5, 2, 3, 4])
def test_attention_map_is_sum_or_max_of_absolute_powers(p, mapping):
    expected = np_map(X, p, mapping)
    np.testing.assert_allclose(utils.attention_map(tensor(X), p, mapping), expected, rtol=1e-12)
    np.testing.assert_allclose(utils.at(tensor(X), p, mapping), np_at(expected), rtol=1e-12)


def test_attention_map_does_not_depend_on_signs_even_for_odd_p():
    assert torch.equal(utils.attention_map(tensor(X), 3), utils.attention_map(tensor(-X), 3))


def test_attention_maps_of_half_precision_activations_are_float32():
    x = tensor(X).bfloat16()
    assert utils.attention_map(x).dtype == torch.float32
    torch.testing.assert_close(utils.attention_map(x), utils.attention_map(x.float()), rtol=0, atol=0)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32, torch.float64])
def test_attention_map_and_its_gradient_equal_those_that_autograd_makes(dtype):
    torch.manual_seed(0)
    x = torch.randn(70, 5, 4, 6).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    weights = torch.randn(70, 4, 6, dtype=utils.attention_map(x).dtype)
    plain = (x if dtype == torch.float64 else x.float()).square().sum(1)
    assert torch.equal(utils.attention_map(x), plain)
    ours, theirs = (torch.autograd.grad(q, x, weights)[0] for q in (utils.attention_map(x), plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    assert ours.dtype == dtype and ours.is_contiguous(memory_format=torch.channels_last)


def test_attention_map_can_be_differentiated_twice():
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(utils.attention_map, x)


@pytest.mark.parametrize('bad', [{'p': 0}, {'p': -1}, {'p': math.nan}, {'mapping': 'mean'}])
def test_unknown_attention_map_is_refused(bad):
    with pytest.raises(ValueError, match='attention map'):
        utils.attention_map(tensor(X), **bad)


def test_at_loss_code_form_is_the_mean_square_of_the_difference():
    expected = ((np_at(np_map(X)) - np_at(np_map(Y))) ** 2).mean()
    assert utils.at_loss(tensor(X), tensor(Y)).item() == pytest.approx(expected, rel=1e-12)


def test_at_loss_paper_form_is_half_the_mean_norm_of_the_difference():
    norms = np.sqrt(((np_at(np_map(X)) - np_at(np_map(Y))) ** 2).sum(1))
    loss = utils.at_loss(tensor(X), tensor(Y), form='paper')
    assert loss.item() == pytest.approx(norms.mean() / 2, rel=1e-12)


def test_at_loss_of_a_batch_is_the_mean_of_its_samples():
    for form in ('code', 'paper'):
        alone = [utils.at_loss(tensor(X[i : i + 1]), tensor(Y[i : i + 1]), form=form) for i in range(len(X))]
        together = utils.at_loss(tensor(X), tensor(Y), form=form)
        assert together.item() == pytest.approx(sum(alone).item() / len(X), rel=1e-12)


def test_larger_maps_are_average_pooled_to_the_smaller():
    large = rng.standard_normal((3, 2, 8, 12))
    pooled = np_map(large).reshape(3, 4, 2, 6, 2).mean((2, 4))
    expected = ((np_at(pooled) - np_at(np_map(Y))) ** 2).mean()
    assert utils.at_loss(tensor(large), tensor(Y)).item() == pytest.approx(expected, rel=1e-12)
    assert utils.at_loss(tensor(Y), tensor(large)).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize('mapping', ['sum', 'max'])
@pytest.mark.parametrize('p', [8, 16])
@pytest.mark.parametrize('scale', [1e-6, 1e-3, 1e3, 1e6])
def test_a_high_power_neither_over_nor_underflows(p, mapping, scale):
    """Float32 cannot hold 1e-96 and 1e96; float64 can."""
    x, y = (scale * torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    exact = x.double().requires_grad_()
    x.requires_grad_()
    loss, expected = (utils.at_loss(a, y.to(a.dtype), p, mapping) for a in (x, exact))
    (gradient,), (exact_gradient,) = torch.autograd.grad(loss, x), torch.autograd.grad(expected, exact)
    assert expected > 1e-4
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)
    torch.testing.assert_close(
        gradient.double(), exact_gradient, rtol=1e-3, atol=1e-5 * exact_gradient.abs().max().item()
    )


@pytest.mark.parametrize('mapping', ['sum', 'max'])
@pytest.mark.parametrize('form', ['code', 'paper'])
@pytest.mark.parametrize('p', [0.5, 1, 1.5, 2, 4, 16])
def test_a_sample_whose_activations_are_all_zero_has_a_finite_gradient(p, mapping, form):
    x = torch.rand(2, 3, 4, 4)
    x[0] = 0
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(utils.at_loss(x, torch.rand(2, 3, 4, 4), p, mapping, form), x)
    assert gradient.isfinite().all() and (gradient[1] != 0).any()


@pytest.mark.parametrize('p', [0.1, 0.5])
def test_the_gradient_of_a_low_power_is_finite_at_zero(p):
    x = torch.rand(2, 3, 4, 4).sub(0.5).relu().requires_grad_()
    (gradient,) = torch.autograd.grad(utils.at_loss(x, torch.rand(2, 3, 4, 4), p), x)
    assert gradient.isfinite().all() and (gradient[x > 0] != 0).any() and (gradient[x == 0] == 0).all()
    torch.testing.assert_close(utils.attention_map(x, p), x.pow(p).sum(1))


def test_at_loss_does_not_see_the_scale_of_activations():
    assert utils.at_loss(tensor(X), tensor(3 * X)).item() == pytest.approx(0, abs=1e-30)


def test_unknown_form_is_refused():
    with pytest.raises(ValueError, match='form'):
        utils.at_loss(tensor(X), tensor(Y), form='mean')


@pytest.mark.parametrize('form', ['code', 'paper'])
@pytest.mark.parametrize('p, mapping', [(1, 'sum'), (2, 'sum'), (3, 'sum'), (4, 'sum'), (2, 'max')])
def test_at_loss_gradient_equals_finite_differences(p, mapping, form):
    x, y = tensor(X[:2, :, :3, :3], True), tensor(Y[:2, :, :3, :3])
    assert torch.autograd.gradcheck(lambda a: utils.at_loss(a, y, p, mapping, form), x)


def test_at_loss_gradient_equals_finite_differences_when_maps_are_pooled():
    x, y = tensor(X[:2], True), tensor(Y[:2, :, :2, :3])
    assert torch.autograd.gradcheck(lambda a: utils.at_loss(a, y), x)


@pytest.mark.parametrize('form', ['code', 'paper'])
def test_a_student_equal_to_its_teacher_has_no_loss_and_a_zero_gradient(form):
    x = tensor(X, True)
    loss = utils.at_loss(x, tensor(X), form=form)
    loss.backward()
    assert loss.item() == 0 and torch.equal(x.grad, torch.zeros_like(x))


def test_activations_of_zero_have_a_finite_loss_and_gradient():
    x = torch.zeros(2, 3, 4, 4, requires_grad=True)
    loss = utils.at_loss(x, torch.rand(2, 5, 4, 4))
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all()


LOGITS, TEACHER = 3 * rng.standard_normal((4, 6)), 3 * rng.standard_normal((4, 6))
LABELS = np.array([0, 5, 2, 2])


def np_kd(temperature):
    p, q = np_softmax(LOGITS / temperature), np_softmax(TEACHER / temperature)
    return temperature**2 * (q * np.log(q / p)).sum(1).mean()


def test_full_activation_loss_is_the_mean_square_of_normalised_activations():
    x, y = (torch.randn(4, 6, 5, 3, dtype=torch.float64) for _ in range(2))
    a, b = (np.stack([v.ravel() / np.sqrt((v**2).sum()) for v in t.numpy()]) for t in (x, y))
    assert utils.full_activation_loss(x, y).item() == pytest.approx(((a - b) ** 2).mean(), rel=1e-12)
    assert utils.full_activation_loss(3 * x, x).item() == pytest.approx(0, abs=1e-15)
    assert utils.full_activation_loss(x.half(), y.half()).dtype == torch.float32


def test_full_activation_loss_pools_the_larger_and_refuses_other_channels():
    x, y = torch.randn(2, 3, 8, 6), torch.randn(2, 3, 4, 3)
    pooled = x.reshape(2, 3, 4, 2, 3, 2).mean((3, 5))
    for a, b in ((x, y), (y, x)):
        torch.testing.assert_close(utils.full_activation_loss(a, b), utils.full_activation_loss(pooled, y))
    with pytest.raises(ValueError, match='3 channels are not 5'):
        utils.full_activation_loss(x, torch.randn(2, 5, 8, 6))


def test_full_activation_loss_gradient_equals_finite_differences_through_an_adapter():
    group = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, 1, 1, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 5, 2, 2, dtype=torch.float64)

    def loss(group, weight):
        return utils.full_activation_loss(utils.adapt((group,), {'adapter.0': weight})[0], y)

    assert torch.autograd.gradcheck(loss, (group, weight))


def test_adapters_are_made_where_channels_differ_alone():
    groups, teacher_groups = [[torch.empty(1, c, 2, 2) for c in channels] for channels in ((3, 4, 5), (6, 4, 7))]
    adapters = utils.adapter_params(groups, teacher_groups, [0, 1])
    assert {k: tuple(v.shape) for k, v in adapters.items()} == {'adapter.0': (6, 3, 1, 1)}
    assert [g.shape[1] for g in utils.adapt(groups, adapters)] == [6, 4, 5]
    assert utils.without_adapters({**adapters, 'conv0': 1}) == {'conv0': 1}


def test_gradient_loss_is_half_the_mean_norm_of_the_difference():
    j, j_t = (torch.randn(4, 3, 5, 5, dtype=torch.float64) for _ in range(2))
    norms = [np.linalg.norm((a - b).ravel()) for a, b in zip(j.numpy(), j_t.numpy())]
    assert utils.gradient_loss(j, j_t).item() == pytest.approx(np.mean(norms) / 2, rel=1e-12)
    assert utils.gradient_loss(j).item() == pytest.approx(np.mean([np.linalg.norm(a) for a in j.numpy()]) / 2)


def test_input_gradient_is_that_of_each_samples_own_cross_entropy():
    """For a linear network it is known: W^T (softmax(y) - onehot)."""
    weight = torch.randn(7, 12, dtype=torch.float64)
    images, labels = torch.randn(5, 3, 2, 2, dtype=torch.float64, requires_grad=True), torch.tensor([0, 3, 6, 1, 1])
    logits = images.flatten(1) @ weight.T
    p = torch.softmax(logits, 1).detach() - torch.nn.functional.one_hot(labels, 7)
    torch.testing.assert_close(utils.input_gradient(logits, images, labels), (p @ weight).reshape(5, 3, 2, 2))


def test_a_gradient_equal_to_the_teachers_has_no_loss_and_a_zero_gradient():
    j = torch.randn(3, 3, 4, 4, requires_grad=True)
    loss = utils.gradient_loss(j, j.detach())
    assert loss.item() == 0 and torch.autograd.grad(loss, j)[0].abs().max() == 0


@pytest.mark.parametrize('temperature', [1, 4, 20])
def test_kd_loss_is_summed_over_classes_and_averaged_over_samples(temperature):
    loss = utils.kd_loss(tensor(LOGITS), tensor(TEACHER), temperature)
    assert loss.item() == pytest.approx(np_kd(temperature), rel=1e-10)


@pytest.mark.parametrize('alpha', [0, 0.3, 0.9, 1])
def test_distillation_weighs_kd_and_cross_entropy(alpha):
    cross_entropy = -np.log(np_softmax(LOGITS)[np.arange(4), LABELS]).mean()
    loss = utils.distillation(tensor(LOGITS), tensor(TEACHER), torch.tensor(LABELS), 4, alpha)
    assert loss.item() == pytest.approx(alpha * np_kd(4) + (1 - alpha) * cross_entropy, rel=1e-10)


def test_distillation_gradient_equals_finite_differences():
    teacher, labels = tensor(TEACHER), torch.tensor(LABELS)
    assert torch.autograd.gradcheck(lambda y: utils.distillation(y, teacher, labels, 4, 0.9), tensor(LOGITS, True))


def test_parameters_are_drawn_as_the_authors_draw_them():
    torch.manual_seed(0)
    conv, linear, bn = utils.conv_params(64, 128, 3), utils.linear_params(200, 100), utils.bnparams(10_000)
    assert conv.shape == (128, 64, 3, 3) and linear['weight'].shape == (100, 200)
    assert conv.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.02)
    assert linear['weight'].std().item() == pytest.approx(math.sqrt(2 / 200), rel=0.02)
    assert not linear['bias'].any() and not bn['bias'].any() and not bn['running_mean'].any()
    assert bn['weight'].min() >= 0 and bn['weight'].max() <= 1
    assert bn['weight'].mean().item() == pytest.approx(0.5, abs=0.02)
    assert torch.equal(bn['running_var'], torch.ones(10_000))


def test_flatten_joins_keys_with_dots_and_leaves_out_none():
    assert utils.flatten({'a': 1, 'b': {'c': {'d': 2}, 'e': None}}) == {'a': 1, 'b.c.d': 2}


def test_cast_makes_leaves_of_the_dtype():
    params = utils.cast({'a': torch.ones(2, requires_grad=True), 'b': {'c': torch.ones(1)}}, 'double')
    assert params['a'].dtype == params['b']['c'].dtype == torch.float64
    assert params['a'].is_leaf and not params['a'].requires_grad


def test_all_but_running_statistics_are_trained():
    params = {'conv': utils.conv_params(2, 3), **utils.flatten({'bn': utils.bnparams(3)})}
    utils.set_requires_grad_except_bn_(params)
    assert {k for k, v in params.items() if v.requires_grad} == {'conv', 'bn.weight', 'bn.bias'}
    assert utils.num_parameters(params) == 6 + 3 + 3


def test_tensor_table_names_shapes_and_what_is_not_trained(capsys):
    utils.print_tensor_dict({'conv0': torch.zeros(16, 3, 3, 3, requires_grad=True), 'bn.running_mean': torch.zeros(4)})
    first, second = capsys.readouterr().out.splitlines()
    assert first.split() == ['0', 'conv0', '16x3x3x3', 'float32']
    assert second.split() == ['1', 'bn.running_mean', '4', 'float32', 'not', 'trained']
