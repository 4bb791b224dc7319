"""The losses in a training loop of one's own: other shapes, maps that were kept, torch.func."""

import pytest
import torch
from test_utils import X, Y, tensor

import utils


@pytest.mark.parametrize(
    'x, y, named',
    [
        ((2, 3, 4, 4), (3, 3, 4, 4), '2 samples of the student are not the 3 of the teacher'),
        ((1, 3, 4, 4), (2, 3, 4, 4), '1 samples'),  # these would be broadcast
        ((2, 16, 8), (2, 16, 8), r'\(2, 16, 8\)'),  # tokens would be taken for maps
        ((2, 3, 2, 4, 4), (2, 3, 2, 4, 4), r'\(2, 3, 2, 4, 4\)'),
        ((2, 3, 4, 4), (2, 3, 2, 4, 4), r'\(2, 3, 2, 4, 4\)'),
        ((2, 3), (2, 3), r'\(2, 3\)'),
    ],
)
def test_activations_of_other_shapes_are_refused(x, y, named):
    for p in 2, 4:
        with pytest.raises(ValueError, match=named):
            utils.at_loss(torch.zeros(x), torch.zeros(y), p)
    if len(y) == 4:
        with pytest.raises(ValueError, match=named):
            utils.full_activation_loss(torch.zeros(x), torch.zeros(y))


@pytest.mark.parametrize('shape', [(1, 10), (4, 1)])
def test_what_would_be_broadcast_is_refused(shape):
    logits = torch.zeros(4, 10)
    for x, y in ((logits, torch.zeros(shape)), (torch.zeros(shape), logits)):
        with pytest.raises(ValueError, match='logits .* of the student, but '):
            utils.kd_loss(x, y, 4)
        with pytest.raises(ValueError, match='input gradients .* of the student, but '):
            utils.gradient_loss(x, y)


def test_a_map_kept_in_half_precision_is_that_map():
    kept = utils.attention_map(30 * tensor(Y)).half()  # its norm is beyond what half precision holds
    assert utils.at_loss(tensor(X), kept) == pytest.approx(utils.at_loss(tensor(X), tensor(Y)).item(), rel=1e-3)
    assert utils.at_loss(tensor(X), torch.zeros_like(kept)).isfinite()


def test_at_loss_can_be_transformed_by_torch_func():
    x, y = tensor(X, True), tensor(Y)
    (expected,) = torch.autograd.grad(utils.at_loss(x, y), x)
    assert torch.equal(torch.func.grad(utils.at_loss)(x, y), expected)
    each = torch.func.vmap(lambda a, b: utils.at_loss(a[None], b[None]))(x, y)
    torch.testing.assert_close(each.mean(), utils.at_loss(x, y))
