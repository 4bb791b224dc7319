"""Loads the authors' scripts from a clone of github.com/szagoruyko/attention-transfer, to compare them with ours."""

import importlib.util
import os
import sys
import types

import torch
import torch.nn.functional as F


class Nested(dict):
    """What their code uses of the package nested_dict."""

    def items_flat(self):
        for key, value in self.items():
            if isinstance(value, dict):
                yield from (((key, *inner), leaf) for inner, leaf in Nested(value).items_flat())
            else:
                yield (key,), value


def load(folder, name):
    """The module of their cifar.py, imagenet.py or utils.py, beside ours of the same names."""
    spec = importlib.util.spec_from_file_location(f'authors_{name}', os.path.join(folder, f'{name}.py'))
    module = importlib.util.module_from_spec(spec)
    theirs = {'nested_dict': types.SimpleNamespace(nested_dict=Nested)}
    if name != 'utils':
        theirs['utils'] = load(folder, 'utils')
    ours = {name: sys.modules.pop(name) for name in theirs if name in sys.modules}
    sys.modules.update(theirs)
    try:
        spec.loader.exec_module(module)
    finally:  # only these, since PyTorch cannot import its modules twice
        for name in theirs:
            del sys.modules[name]
        sys.modules.update(ours)
    return module


def step(folder, student, teacher=None, alpha=0.0, beta=0.0):
    """Their step in float32, from their cifar.py and utils.py, without the data loader: step(images, labels).

    student, teacher: (depth, width, number of classes) of wide ResNets, the teacher's or None.
    """
    module = load(folder, 'cifar')
    f, params = module.resnet(*student)
    g, fixed = module.resnet(*teacher) if teacher else (None, {})
    fixed = {key: value.detach() for key, value in fixed.items()}
    optimizer = torch.optim.SGD([v for v in params.values() if v.requires_grad], 0.1, 0.9, weight_decay=5e-4)

    def loss_of(images, labels):
        y, groups = f(images, params, True)
        if not teacher:
            return F.cross_entropy(y, labels)
        with torch.no_grad():
            y_t, groups_t = g(images, fixed, False)
        at = [module.utils.at_loss(a, b).sum() for a, b in zip(groups, groups_t)]
        for loss in at:
            loss.item()  # for their meters
        return module.utils.distillation(y, y_t, labels, 4, alpha) + beta * sum(at)

    def step(images, labels):
        loss = loss_of(images, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step
