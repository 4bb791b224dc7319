"""Mutated files and random words are read or refused in one line."""

import io
import json
import os
import sys

import h5py
import numpy as np
import pytest
import safetensors.torch
from conftest import draw
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import cifar
import finetune
import imagenet
import plot
import reproduce
import resnet
from engine.log import read_log
from formats import networks, write
from images import crops, decode

LONG = bool(os.environ.get('AT_LONG_TESTS'))
FUZZ = settings(
    max_examples=3000 if LONG else 80,
    deadline=10_000,
    derandomize=not LONG,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
MUTATIONS = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 255), st.sampled_from('set cut insert'.split())), max_size=6
)


def mutate(content, mutations):
    """Bytes with some of them set, cut out from, or inserted."""
    content = bytearray(content)
    for where, byte, kind in mutations:
        at = int(where * max(0, len(content) - 1))
        if kind == 'set' and content:
            content[at] = byte
        elif kind == 'cut':
            del content[at : at + byte]
        else:
            content[at:at] = bytes([byte]) * (1 + byte % 9)
    return bytes(content)


@pytest.fixture(scope='module')
def network_files(tmp_path_factory):
    """A small network in each format that is read: {name: bytes}."""
    _, params = resnet.wide_resnet(10, 0.0625, 3)
    params = {k: v.detach() for k, v in params.items()}
    folder = tmp_path_factory.mktemp('networks')
    write.save(folder / 'torch', {'params': params, 'epoch': 3})
    safetensors.torch.save_file(params, folder / 'safetensors')
    with h5py.File(folder / 'hdf5', 'w') as file:
        for key, value in params.items():
            file.create_dataset(f'data/{key}', data=value.numpy())
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize('kind', ['torch', 'safetensors', 'hdf5'])
@FUZZ
@given(mutations=MUTATIONS)
def test_a_mutated_network_is_read_or_refused(network_files, tmp_path_factory, kind, mutations):
    path = tmp_path_factory.getbasetemp() / f'mutated.{kind}'
    path.write_bytes(mutate(network_files[kind], mutations))
    try:
        _, params = networks.load_teacher(path)
    except ValueError as error:
        assert str(error).startswith(str(path)) and len(str(error)) < 1000
    else:
        assert all(v.isfinite().all() for v in params.values())


@pytest.mark.parametrize('suffix', ['.jpg', '.png', '.bmp', '.webp', '.gif', '.tif'])
@FUZZ
@given(mutations=MUTATIONS, boxed=st.booleans())
def test_a_mutated_image_is_read_or_refused(tmp_path_factory, suffix, mutations, boxed):
    path = tmp_path_factory.getbasetemp() / f'mutated{suffix}'
    content, image = io.BytesIO(), Image.fromarray(draw(np.random.default_rng(0), 1, (80, 40)))
    image.putalpha(image.convert('L'))  # of which a JPEG has none
    image.convert('RGB' if suffix == '.jpg' else 'RGBA').save(content, Image.registered_extensions()[suffix])
    path.write_bytes(mutate(content.getvalue(), mutations))
    try:
        trials = crops.augmentation(0, 1, 0)[1]
        found = decode.read_image(path, (lambda h, w: crops.random_box(h, w, trials)) if boxed else None)
    except ValueError as error:
        assert str(error).startswith(str(path))
    else:
        assert found.dtype == np.uint8 and found.ndim == 3 and found.shape[2] == 3 and found.size


@FUZZ
@given(mutations=MUTATIONS, whole=st.booleans())
def test_a_mutated_log_is_read_or_refused(tmp_path_factory, mutations, whole):
    path = tmp_path_factory.getbasetemp() / 'log.txt'
    line = (
        'json_stats: ' + json.dumps({'epoch': 1, 'lr': 0.1, 'epoch_step': '[2]', 'test_acc': 3.5, 'at0': 1e-5}) + '\n'
    )
    path.write_bytes(mutate((line * 3).encode(), mutations))
    try:
        assert all(isinstance(record, dict) for record in read_log(path))
        if whole:
            plot.draw_curves([path])
    except ValueError as error:
        assert str(path) in str(error)


WORDS = st.lists(
    st.one_of(
        st.sampled_from(
            '--lr --beta --alpha --epochs --epoch_step --groups --width --depth --net --transfer --penalty --gamma '
            '--seed --power --temperature --image_size --randomcrop_pad --holdout --batch_size --resume --save_every '
            'nin full [1,2] 1 0 -1 1e3 nan inf auto 0,1 0.5 --no_bn --rows --seeds --jobs demo table1'.split()
        ),
        st.text(max_size=8),
    ),
    max_size=8,
)


@pytest.mark.parametrize('module', [cifar, imagenet, finetune, reproduce])
@FUZZ
@given(words=WORDS)
def test_any_words_are_understood_or_refused(monkeypatch, capsys, module, words):
    monkeypatch.setattr(sys, 'argv', [f'{module.__name__}.py', *words])
    try:
        module.parse()
    except ValueError as error:
        assert str(error)
    except SystemExit as stop:
        asked = {'--help', '-h'} & set(words)
        assert stop.code == (0 if asked else 2)
        assert asked or capsys.readouterr().err.count('error: ') == 1
