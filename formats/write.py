"""Write files whole or not at all, and networks in other formats."""

import contextlib
import io
import os
from functools import partial

import h5py
import safetensors.torch
import torch
from torch.utils._pytree import tree_map_only

from formats.faults import told
from formats.networks import describe
from formats.read import check_regular
from formats.torchvision import to_torchvision
from imagenet_resnet import fold_batch_norm, imagenet_forward


def save(path, state):
    """Write a checkpoint whole or not at all: to a file beside it, flushed to the disk, then renamed over it.

    Tensors are written in contiguous order, whatever their order in memory: files do not depend on the device.
    Raises OSError (no space, no permission) and leaves the old checkpoint unchanged.
    """
    contiguous = partial(torch.clone, memory_format=torch.contiguous_format)
    buffer = io.BytesIO()
    torch.save(tree_map_only(torch.Tensor, contiguous, state), buffer)
    write_whole(path, buffer.getbuffer())


def write_whole(path, content):
    """Replace a file's content (bytes) so that readers see the old or the new one, even after a crash, never a part."""
    check_regular(path)
    temporary = f'{path}.tmp'
    try:
        if os.path.lexists(temporary):
            os.unlink(temporary)  # left by a killed run, or a link planted to redirect the writing
        with open(temporary, 'xb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise not_written(path, error, '; the old file is unchanged' * os.path.exists(path)) from None


def not_written(path, error, more=''):
    """The OSError `told` of a file that could not be written."""
    return told(f'{path} could not be written: {error.strerror}{more}', error)


def write(f, params, kind, image_size):
    """The bytes of a file that holds a network in another format; see `WRITERS`.

    ImageNet ResNets are folded for upstream, hkl and onnx. Wide ResNets are not, since some of their batch norms have
    no convolution before them: for them upstream and hkl hold the flat params as they are.
    Raises ValueError if the format cannot hold the network or a package is missing.
    """
    imagenet = f is imagenet_forward
    if kind == 'torchvision' and not imagenet:
        raise ValueError(
            f'torchvision has no network like {describe(params)}: --to torchvision is for ImageNet ResNets'
        )
    if imagenet and kind in ('upstream', 'hkl', 'onnx'):
        params = fold_batch_norm(params)
    params = {k: v.detach().contiguous() for k, v in params.items()}
    return WRITERS[kind](params, f, image_size or (224 if imagenet else 32))


def _torch(state, *_):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _hickle(params, *_):
    import hickle  # slow to import, and only used to write

    buffer = io.BytesIO()
    with h5py.File(buffer, 'w') as file:
        hickle.dump({k: v.numpy() for k, v in params.items()}, file)
    return buffer.getvalue()


def _onnx(params, f, size):
    """An ONNX model: float32 images (N, 3, size, size), for any N, -> logits (N, classes)."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ValueError(f'--to onnx needs {error.name}: pip install -r requirements-dev.txt') from None
    network = torch.nn.Module()
    network.forward = lambda images: f(images, params, False)[0]
    try:
        network(torch.zeros(2, 3, size, size))
    except RuntimeError:
        raise ValueError(f'--image_size {size} is too small for the network') from None
    batch = {'images': {0: torch.export.Dim('N', min=1)}}
    program = torch.onnx.export(
        network.eval(),
        (torch.zeros(2, 3, size, size),),
        dynamo=True,
        verbose=False,
        input_names=['images'],
        output_names=['logits'],
        dynamic_shapes=batch,
    )
    return program.model_proto.SerializeToString()


WRITERS = {
    'torchvision': lambda params, *_: _torch(to_torchvision(params)),  # a state_dict
    'upstream': _torch,  # the authors' export: a bare dictionary of tensors
    'hkl': _hickle,  # the same, written by hickle
    'safetensors': lambda params, *_: safetensors.torch.save(params),  # the params as they are
    'onnx': _onnx,
}
