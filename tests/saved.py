"""Small networks, files of them in the layouts of others, and what is read from them."""

import numpy as np
import pytest
import torch

import resnet
from formats import networks


class Touch:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, 'w')


def reason(path):
    """The error of a file that is refused as a teacher: a ValueError of one line."""
    with pytest.raises(ValueError) as error:
        networks.load_teacher(path)
    assert '\n' not in str(error.value) and str(error.value).startswith(str(path))
    return str(error.value)


def small_export(widths=(2, 3, 4, 5), classes=10):
    """The folded export of a ResNet-34 in the authors' layout, with odd widths: {name: float32 array}."""
    rng, arrays, ni = np.random.default_rng(0), {}, widths[0]

    def conv(name, ni, no, k):
        arrays[f'{name}.weight'] = rng.normal(size=(no, ni, k, k)).astype('f') * (2 / (ni * k * k)) ** 0.5
        arrays[f'{name}.bias'] = rng.normal(size=no).astype('f')

    conv('conv0', 3, ni, 7)
    for g, (blocks, no) in enumerate(zip((3, 4, 6, 3), widths)):
        for i in range(blocks):
            conv(f'group{g}.block{i}.conv0', ni, no, 3)
            conv(f'group{g}.block{i}.conv1', no, no, 3)
            if ni != no or (g and not i):
                conv(f'group{g}.block{i}.conv_dim', ni, no, 1)
            ni = no
    arrays['fc.weight'], arrays['fc.bias'] = rng.normal(size=(classes, ni)).astype('f'), np.zeros(classes, 'f')
    return arrays


def tensors(arrays):
    return {k: torch.from_numpy(v) for k, v in arrays.items()}


def wide_resnet(depth=10):
    torch.manual_seed(0)
    f, params = resnet.wide_resnet(depth, 1, 4)
    return f, {k: torch.rand_like(v) * 0.2 + (0.5 if 'running_var' in k else -0.1) for k, v in params.items()}


def logits_of(path, images):
    f, params = networks.load_teacher(path)
    assert all(v.dtype == torch.float32 and not v.requires_grad for v in params.values())
    return f(images, params, False)[0]


def assert_near(logits, expected):
    """Assert that logits are equal to 1e-5 of the largest one."""
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def hickle_1(file, arrays):
    file['type'] = np.array([b'dict'])
    for key, value in arrays.items():
        file[f'data/{key}'], file[f'data/_{key}'] = value, np.array([b'ndarray'])


def hickle_2(file, arrays, quote='', root='data_0', inner='data_0', kind='type'):
    file.attrs.update({'CLASS': 'hickle', 'VERSION': 2, 'type': [b'hickle']})
    group = file.create_group(root)
    group.attrs[kind] = [b'dict']
    for key, value in arrays.items():
        item = group.create_group(f'{quote}{key}{quote}')
        item.attrs[kind] = [b'dict_item']
        item.create_dataset(inner, data=value).attrs[kind] = [b'ndarray']


def hickle_3(file, arrays):
    hickle_2(file, arrays, quote="'")


def hickle_4(file, arrays):
    hickle_2(file, arrays, quote="'", root='data', inner='data', kind='base_type')
