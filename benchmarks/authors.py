"""Loads the authors' scripts from a clone of github.com/szagoruyko/attention-transfer, to compare them with ours."""

import importlib.util
import os
import sys
import types
from unittest import mock


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
    with mock.patch.dict(sys.modules, theirs):
        spec.loader.exec_module(module)
    return module
