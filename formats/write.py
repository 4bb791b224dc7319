"""Files written whole or not at all, and networks in the formats of others."""

import io
import os

import h5py
import safetensors.torch
import torch

from formats.torchvision import to_torchvision
from imagenet_resnet import fold_batch_norm, imagenet_forward


def save(path, state):
    """Write a checkpoint whole or not at all: to a file beside it, flushed to the disk, then renamed over it.

    Raises OSError (no space, no permission) and leaves the checkpoint that was there as it was.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_whole(path, buffer.getbuffer())


def write_whole(path, content):
    """Replace a file's content (bytes) so that a reader, or a crash, sees the old or the new, never a part."""
    temporary = f'{path}.tmp'
    try:
        if os.path.lexists(temporary):
            os.unlink(temporary)  # of a killed run, or a link that somebody laid there to be written through
        with open(temporary, 'xb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if os.path.lexists(temporary):
            os.unlink(temporary)
        raise not_written(path, error, '; what was there before is whole') from None


def not_written(path, error, more=''):
    """The OSError that says so for the user, with the errno of `error`."""
    told = OSError(f'{path} could not be written: {error.strerror}{more}')
    told.errno = error.errno
    return told


def write(f, params, kind, image_size):
    """The bytes of a file that holds a network in another format; see `WRITERS`.

    ImageNet ResNets are folded for upstream, hkl and onnx; wide ResNets, which have no convolution before every batch
    norm, keep theirs: for them upstream and hkl hold the flat params as they are.
    Raises ValueError for what the format cannot hold, and where a package is missing.
    """
    imagenet = f is imagenet_forward
    if kind == 'torchvision' and not imagenet:
        raise ValueError('torchvision has no wide ResNets of this kind: --to torchvision is for ImageNet ResNets')
    if imagenet and kind in ('upstream', 'hkl', 'onnx'):
        params = fold_batch_norm(params)
    params = {k: v.detach().contiguous() for k, v in params.items()}
    return WRITERS[kind](params, f, image_size or (224 if imagenet else 32))


def _torch(state, *_):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def _hickle(params, *_):
    import hickle  # slow to import, and only ever a writer

    buffer = io.BytesIO()
    with h5py.File(buffer, 'w') as file:
        hickle.dump({k: v.numpy() for k, v in params.items()}, file)
    return buffer.getvalue()


def _onnx(params, f, size):
    """Logits (N, classes) of float32 images (N, 3, size, size), N at will, as an ONNX model."""
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
    'hkl': _hickle,  # the same as hickle writes it
    'safetensors': lambda params, *_: safetensors.torch.save(params),  # the params as they are
    'onnx': _onnx,
}
