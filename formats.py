"""Networks in the formats of others: HDF5 as hickle writes it, safetensors, torchvision's state_dict and ONNX.

A file is told apart by its content, and is data: nothing in it runs, opens another file, or takes more memory than
`MAX_BYTES` and the file's own size allow.
"""

import collections
import io
import json
import math
import os
import pickletools
import re
import shlex
import warnings
import zipfile
import zlib

import h5py
import numpy as np
import safetensors.torch
import torch

import resnet
from utils import STATISTICS

MAX_BYTES = 4 * 2**30  # of a file, and of all arrays in it
MAX_NODES = 10_000  # in one group of an HDF5 file; a ResNet-152 has fewer than 1,000 arrays
MAX_CHUNKS = 100_000  # of one HDF5 dataset
MAX_UNFOLDED = 10_000_000  # objects of a pickle, each counted as often as others hold it
PICKLED = re.compile(  # all that the pickle of a checkpoint has to name; bytearray(2**34) is short, but not small
    r'collections OrderedDict|torch\._utils _rebuild_(tensor|tensor_v2|parameter)|torch\.nn\.parameter Parameter'
    r'|torch (\w+Storage|Size|device|bool|[a-z]+\d+)'
)
SETTINGS = re.compile(  # names of what training scripts save beside the weights
    r'(argparse|collections|datetime|easydict|lightning\w*|numpy|omegaconf|pathlib|pytorch_lightning|torch\.optim|yacs)'
    r'[. ].*|_codecs encode|(__builtin__|builtins) (dict|list|object|set)|copy_reg _reconstructor'
)
# Under these names files hold the params of a network: averaged over training first, as timm takes them.
PARTS = ('params', 'state_dict', 'model_state_dict', 'model', 'net', 'network', 'module', 'student')
AVERAGED = ('ema', *(f'{part}_ema' for part in PARTS))
ADVISED = {name: (1, name) for name in (*AVERAGED, *PARTS, 'stats')}  # one object of a pickle, with its text
ONE = (1, None)  # the same without a text that matters
MAX_REFUSED = 1000  # names in one pickle; advice looks at them all
MAX_NAME = 200  # characters of a module or a class that a pickle names
MAX_GROWTH = 8  # times, of a pickle that is rewritten
DEFLATE_RATIO = 1032  # no deflate stream unpacks to more bytes for each of its own (zlib.net/zlib_tech.html)
NORM = ('weight', 'bias', *STATISTICS)


def read(path):
    """What a torch, safetensors or HDF5 file holds, told apart by its first bytes; usually a dictionary of tensors.

    Raises OSError where there is no such file and ValueError where it is none of these, damaged or hostile.
    """
    if not os.path.isfile(path):
        raise OSError(f'{path}: no such checkpoint')
    size = os.path.getsize(path)
    if size > MAX_BYTES:
        raise ValueError(f'{path} is not a checkpoint: it has {size:,} bytes, and at most {MAX_BYTES:,} are read')
    with open(path, 'rb') as file:
        start = file.read(9)
    if start.startswith(b'\x89HDF\r\n\x1a\n'):
        reader = read_hdf5
    else:  # a safetensors file is the length of its JSON header in 8 bytes, then the header
        reader = read_safetensors if start[8:] == b'{' else read_torch
    try:
        with warnings.catch_warnings():  # about unusual pickles; what matters becomes an error
            warnings.simplefilter('ignore')
            return reader(path)
    except Exception as error:  # whatever a damaged or hostile file makes a reader raise, it is not a checkpoint
        advice = ''.join(f': {note}' for note in getattr(error, '__notes__', ()))
        damaged = ' of tensors alone' if advice else ', or is damaged'
        raise ValueError(f'{path} is not a checkpoint{damaged} ({_first_line(error)}){advice}') from None


def _first_line(error):
    line = (str(error).strip() or type(error).__name__).splitlines()[0].split('. ')[0]
    return ''.join(c for c in line if c.isprintable())[:200]


def read_torch(path):
    """What torch.save wrote, read with weights_only=True, after a look at its zip archive and its pickles."""
    with open(path, 'rb') as file:
        content = io.BytesIO(file.read())
    if content.getbuffer()[:2] == b'PK':  # as torch does, which takes for an archive what zipfile may not
        content = _plain_archive(content, path)
    else:  # before there were archives: magic number, version, system, objects, names of storages, then their values
        pickles = b''.join(_checked_pickle(content, path) for _ in range(5))
        if pickles != content.getbuffer()[: content.tell()]:
            content = io.BytesIO(pickles + content.read())
    content.seek(0)
    return torch.load(content, map_location='cpu', weights_only=True)


def _plain_archive(content, path):
    """A zip archive written again as zipfile understands it: torch could find another directory in the same bytes."""
    plain, archive = io.BytesIO(), zipfile.ZipFile(content)
    unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > len(content.getbuffer()):  # torch.save does not compress
        raise ValueError(f'a zip archive that unpacks to {unpacked:,} bytes, more than it has itself')
    with zipfile.ZipFile(plain, 'w') as again:
        for entry in archive.infolist():
            values = archive.read(entry)
            if entry.filename.lower().endswith('.pkl'):
                values = _checked_pickle(io.BytesIO(values), path)
            again.writestr(entry.filename, values)
    return plain


def _checked_pickle(stream, path):
    """The bytes of the next pickle of a stream, in protocol 2 and checked; `path` is what advice calls the file."""
    start = stream.tell()
    if stream.getbuffer()[start : start + 2] in (b'\x80\4', b'\x80\5'):
        content = _as_protocol_2(stream)
        _check_pickle(io.BytesIO(content), path)
        return content
    _check_pickle(stream, path)
    return bytes(stream.getbuffer()[start : stream.tell()])


def _as_protocol_2(stream):
    """The next pickle of a stream with the operations of protocol 4 as those of protocol 2, which alone torch reads.

    A class is named by two strings on the stack there, here by an operation that takes their place. What protocol 2
    has no words for stays as it is, for torch to refuse.
    """
    content, start, out = stream.getbuffer(), stream.tell(), bytearray()
    memo = {}  # strings by number, others None
    pushed = collections.deque(maxlen=2)  # strings on top of the stack, and where they are in `out`
    for code, value, at in pickletools.genops(stream):
        operation, name = bytes(content[at : stream.tell()]), code.name
        if name == 'FRAME':
            continue
        if name == 'PROTO':
            operation = b'\x80\2'
        elif name == 'MEMOIZE':
            value = len(memo)
            operation = b'r' + value.to_bytes(4, 'little')
        elif name == 'STACK_GLOBAL':
            (at, module), (_, attribute) = pushed
            if not (module + attribute).isprintable() or max(len(module), len(attribute)) > MAX_NAME:
                raise ValueError(f'{module[:MAX_NAME]!r} {attribute[:MAX_NAME]!r} in it is no name')
            del out[at:]
            operation = f'c{module}\n{attribute}\n'.encode()
        elif name.endswith('GET') and memo.get(value) is not None:  # the place where it was first may have gone
            name, value = 'BINUNICODE', memo[value]
        if name.endswith('PUT') or name == 'MEMOIZE':
            memo[value] = pushed[-1][1] if pushed and len(pushed[-1][1]) <= MAX_NAME else None
        elif name.endswith(('BINUNICODE', 'BINUNICODE8')):
            text = value.encode('utf-8', 'surrogatepass')
            operation = b'X' + len(text).to_bytes(4, 'little') + text
            pushed.append((len(out), value))
        else:
            pushed.clear()
        out += operation
        if len(out) > MAX_GROWTH * (stream.tell() - start) + 2**20:
            raise ValueError(f'a pickle that grows {MAX_GROWTH}-fold in protocol 2')
    return bytes(out)


def _check_pickle(stream, path):
    """Refuse a pickle of other things than tensors in containers, or of tuples in tuples that take for ever to hash.

    Nothing is unpickled: kept instead is the size of what would be on the stack, and its text if that may tell where
    the weights are; None for a mark.
    """
    stack, memo, unfolded, marks, refused, keys = [], {}, 0, 0, [], set()
    for code, value, _ in pickletools.genops(stream):
        if code.name == 'GLOBAL' and not PICKLED.fullmatch(value):
            refused.append(value)
            if len(refused) > MAX_REFUSED:
                raise ValueError(f'{value!r} in it is neither a tensor nor a container of tensors')
        taken, item = 1, ADVISED.get(value, ONE) if code.name.endswith('UNICODE') else ONE
        if pickletools.markobject in code.stack_before:
            while (top := stack.pop()) is not None:
                taken += top[0]
            marks -= 1
            if code.name != 'TUPLE':
                stack.pop()  # the list or dictionary that takes them
        else:
            taken += sum(stack.pop()[0] for _ in code.stack_before)
        unfolded += taken
        if unfolded > MAX_UNFOLDED:
            raise ValueError(f'a pickle of more than {MAX_UNFOLDED:,} objects')
        if code.name.endswith('GET'):
            item = memo[value]
        elif taken > 1:
            item = (taken, None)
        # A key of the outermost dictionary comes right after that, or after a mark and pairs of key and value.
        outermost = len(stack) == 1 or (marks == 1 and stack[1:2] == [None] and len(stack) % 2 == 0)
        if outermost and item and item[1]:
            keys.add(item[1])
        if code.name.endswith('PUT'):
            memo[value] = stack[-1]
        elif code.name == 'MARK':
            stack.append(None)
            marks += 1
        else:
            stack.extend(item for _ in code.stack_after)
    if refused:
        error = ValueError(f'{refused[0]!r} in it is neither a tensor nor a container of tensors')
        advice = _advice(refused, keys, path)
        if advice:
            error.add_note(advice)
        raise error


def _advice(names, keys, path):
    """What helps where a checkpoint names what is not read; keys: those of `ADVISED` in its outermost dictionary."""
    if any(name.startswith('torch.nn.modules.') for name in names):
        return (
            'it is a whole network, which the code that made it alone can read; save its parameters there instead: '
            'torch.save(model.state_dict(), "weights.pth")'
        )
    if not all(map(SETTINGS.fullmatch, names)):
        return None
    part = next((key for key in (*AVERAGED, *PARTS) if key in keys), None)
    if part is None:
        return 'save the parameters alone: torch.save(model.state_dict(), "weights.pth")'
    kept = [part, 'stats'] if part == 'params' and 'stats' in keys else [part]
    program = (
        f'import torch; s = torch.load({json.dumps(str(path))}, map_location="cpu", weights_only=False); '
        f'torch.save({{k: s[k] for k in {json.dumps(kept)}}}, "weights.pth")'
    )
    return (
        f'if you trust it, this takes the weights out, and may run what else is in it: python -c {shlex.quote(program)}'
    )


def read_safetensors(path):
    """The tensors of a safetensors file: {name: tensor}."""
    with open(path, 'rb') as file:
        return safetensors.torch.load(file.read())


# ----------------------------------------------------------------------------------------------------------- HDF5


def read_hdf5(path):
    """The dictionary of float arrays that hickle 1 to 5 wrote: {name: tensor}. hickle itself would run code in it.

    A dictionary is a group `data` (hickle 1, 4, 5) or `data_0` (2, 3). In it stands each array under its key, which
    hickle 3 to 5 put in quotes: as a dataset (1, 5), or alone in a group, named as the outer one is (2, 3, 4).
    Raises ValueError for anything else: other links than hard ones, an object reached twice, values in other files,
    other dtypes, other filters than gzip (HDF5 loads the rest as plug-ins), more bytes than the budget.
    """
    size = os.path.getsize(path)
    with h5py.File(path, 'r', locking=False) as file:
        seen = {_address(file)}
        root = next((name for name in ('data', 'data_0') if name in _names(file)), None)
        if root is None:
            raise ValueError('an HDF5 file without the dictionary that hickle writes')
        arrays, left = {}, MAX_BYTES
        for key, dataset in _dictionary(_follow(file, root, seen), seen):
            if key in arrays:
                raise ValueError(f'{key!r} is there twice')
            left -= _declared_bytes(key, dataset, size)
            if left < 0:
                raise ValueError(f'{key!r} and what is before it declare more than {MAX_BYTES:,} bytes')
            arrays[key] = dataset
        return {key: _read_dataset(key, dataset, size) for key, dataset in arrays.items()}


def _address(node):
    return h5py.h5o.get_info(node.id).addr


def _names(group):
    if len(group) > MAX_NODES:
        raise ValueError(f'{len(group):,} objects in one group; at most {MAX_NODES:,} are read')
    return list(group)


def _follow(group, name, seen):
    """The object under a name: a dataset or group that a hard link leads to, and none before led to."""
    if not isinstance(group.get(name, getlink=True), h5py.HardLink):
        raise ValueError(f'{name!r} is a link to elsewhere')
    node = group[name]
    if _address(node) in seen:
        raise ValueError(f'{name!r} leads to what was there before: a second name or a loop of hard links')
    seen.add(_address(node))
    if not isinstance(node, h5py.Group | h5py.Dataset):
        raise ValueError(f'{name!r} is no array')
    return node


def _dictionary(group, seen):
    """Yield the (key, dataset) pairs of the group that holds a dictionary."""
    if not isinstance(group, h5py.Group):
        raise ValueError(f'{group.name} is no dictionary of arrays')
    names = _names(group)
    there = set(names)
    for name in names:
        if name.startswith('_') and name[1:] in there:
            continue  # hickle 1: the name of the type
        node = _follow(group, name, seen)
        if isinstance(node, h5py.Group):
            inner = _names(node)
            node = _follow(node, inner[0], seen) if inner in (['data'], ['data_0']) else None
        if not isinstance(node, h5py.Dataset):
            raise ValueError(f'{name!r} is a group of other things than one array')
        quoted = re.fullmatch(r"""u?(['"])(.*)\1""", name)  # u: hickle 3 on Python 2
        yield quoted[2] if quoted else name, node


def _filters(dataset):
    plist = dataset.id.get_create_plist()
    return [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]


def _declared_bytes(key, dataset, file_size):
    """The size of an array that may be read; ValueError says why another may not. Nothing is allocated here."""
    plist = dataset.id.get_create_plist()
    if plist.get_layout() == h5py.h5d.VIRTUAL or plist.get_external_count():
        raise ValueError(f'{key!r} keeps its values in other files')
    shuffle, deflate = h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE
    filters = _filters(dataset)
    if filters not in ([], [shuffle], [deflate], [shuffle, deflate]):
        raise ValueError(f'{key!r} is compressed in another way than gzip')
    dtype, shape = dataset.dtype, dataset.shape
    if dtype.kind != 'f' or dtype.itemsize not in (2, 4, 8) or shape is None:
        raise ValueError(f'{key!r} is {dtype}, not an array of floats; what is pickled is not read')
    declared = math.prod(shape) * dtype.itemsize
    if declared > file_size * (DEFLATE_RATIO if deflate in filters else 1):
        raise ValueError(f'{key!r} declares {declared:,} bytes, more than a file of {file_size:,} can hold')
    if dataset.chunks:
        chunks = math.prod(-(-length // chunk) for length, chunk in zip(shape, dataset.chunks))
        if chunks > MAX_CHUNKS or math.prod(dataset.chunks) * dtype.itemsize > max(declared, 2**20):
            raise ValueError(f'{key!r} is cut into {chunks:,} chunks of shape {dataset.chunks}')
    return declared


def _read_dataset(key, dataset, file_size):
    _check_deflated_chunks(key, dataset, file_size)
    array = np.empty(dataset.shape, dataset.dtype.newbyteorder('='))
    if array.size:
        dataset.read_direct(array)
    return torch.from_numpy(array)


def _check_deflated_chunks(key, dataset, file_size):
    """Refuse a chunk that unpacks to more than its share of the array: HDF5 would unpack all of it to memory."""
    filters, chunks = _filters(dataset), []
    if h5py.h5z.FILTER_DEFLATE not in filters:
        return
    limit = math.prod(dataset.chunks) * dataset.dtype.itemsize
    dataset.id.chunk_iter(chunks.append)
    for chunk in chunks:
        if chunk.size > file_size:
            raise ValueError(f'{key!r} has a chunk that is longer than the file')
        skipped, content = dataset.id.read_direct_chunk(chunk.chunk_offset)
        if skipped >> len(filters) - 1 & 1:
            continue  # not compressed, since that made it no shorter
        if len(zlib.decompressobj().decompress(content, limit + 1)) > limit:
            raise ValueError(f'{key!r} has a chunk that unpacks to more than its {limit:,} bytes')


# ---------------------------------------------------------------------------------------------------- torchvision


def from_torchvision(state):
    """A torchvision ResNet's state_dict under the names of `resnet`, without num_batches_tracked.

    conv1.weight -> conv0, bn1.* -> bn0.*, layer1.0.conv1.weight -> group0.block0.conv0, downsample.0.weight ->
    convdim, downsample.1.* -> bndim.*. Other names stay. Raises ValueError where two names become one.
    """
    params = {}
    for key, value in state.items():
        name = _our_name(key)
        if name in params:
            raise ValueError(f'{key} is there twice')
        if not key.endswith('.num_batches_tracked'):
            params[name] = value
    return params


def _our_name(key):
    match = re.fullmatch(r'(?:layer([1-4])\.(\d{1,2})\.)?(?:(conv|bn)([1-3])|downsample\.([01]))\.(\w+)', key)
    if not match or (match[5] and not match[1]):
        return key
    layer, i, kind, number, shortcut, part = match.groups()
    kind = kind or ('conv', 'bn')[int(shortcut)]
    if kind == 'conv' and part != 'weight':
        return key
    base = f'group{int(layer) - 1}.block{int(i)}.' if layer else ''
    return f'{base}{kind}{int(number) - 1 if number else "dim"}' + ('' if kind == 'conv' else f'.{part}')


def to_torchvision(params):
    """The params of an ImageNet ResNet, folded or not, as the state_dict of a torchvision ResNet.

    Folded params get a batch norm that does nothing but add their bias, shortcuts without batch norm one that does
    nothing. Names go as in `from_torchvision`. Raises ValueError for numbers of blocks that torchvision does not have.
    """
    depth, counts, _ = resnet.imagenet_resnet_shape(params)
    if counts != resnet.IMAGENET_DEPTHS[depth][0]:
        here, there = ('-'.join(map(str, numbers)) for numbers in (counts, resnet.IMAGENET_DEPTHS[depth][0]))
        raise ValueError(f"torchvision's resnet{depth} has {there} blocks, not {here}; --to upstream can hold them")
    state = {}
    for key, value in unfold_batch_norm(params).items():
        state[_torchvision_name(key)] = value.detach()
        if key.endswith('.running_var'):
            state[_torchvision_name(key.replace('running_var', 'num_batches_tracked'))] = torch.tensor(0)
    return state


def _torchvision_name(key):
    match = re.fullmatch(r'(?:group(\d)\.block(\d+)\.)?(conv|bn)(\d|dim)(?:\.(\w+))?', key)
    if not match:
        return key
    group, i, kind, number, part = match.groups()
    base = f'layer{int(group) + 1}.{i}.' if group else ''
    name = f'downsample.{int(kind == "bn")}' if number == 'dim' else f'{kind}{int(number) + 1}'
    return f'{base}{name}.{part or "weight"}'


def unfold_batch_norm(params):
    """Undo the layout of `resnet.fold_batch_norm`, though not its arithmetic; what is not folded stays as it is.

    Each convolution's bias becomes a batch norm of weight 1, mean 0 and variance 1 - eps with that bias, and behind a
    shortcut without batch norm comes one with bias 0.
    """
    if 'conv0.weight' not in params:
        plain = {k: v for k, v in params.items() if k.endswith('convdim') and f'{k[:-7]}bndim.weight' not in params}
        return params | {k: v for conv, w in plain.items() for k, v in _norm_of(conv, w.new_zeros(len(w))).items()}
    unfolded = {}
    for key, value in params.items():
        conv, _, part = key.rpartition('.')
        conv = conv.replace('conv_dim', 'convdim')
        if key.startswith('fc.'):
            unfolded[key] = value
        elif part == 'weight':
            unfolded[conv] = value
        else:
            unfolded |= _norm_of(conv, value)
    return unfolded


def _norm_of(conv, bias):
    """The batch norm of a convolution that does nothing but add a bias (C,)."""
    ones = torch.ones_like(bias)
    norm = ones, bias, torch.zeros_like(bias), ones - 1e-5
    return {f'{conv.replace("conv", "bn")}.{name}': tensor for name, tensor in zip(NORM, norm)}


def check_name(name):
    """Refuse a name that is none of the networks that `download` fetches."""
    names = [f'resnet{depth}' for depth in resnet.IMAGENET_DEPTHS]
    if name not in names:
        raise ValueError(f'torchvision:{name}: there are {", ".join(f"torchvision:{n}" for n in names)}')


def download(name):
    """The state_dict of torchvision's own trained network of that name (resnet18, 34, 50, 101 or 152).

    torchvision keeps what it has fetched in ~/.cache/torch/hub. Raises ValueError for another name, OSError where it
    cannot be fetched or read.
    """
    import torchvision  # slow to import, and needed by no training script

    check_name(name)
    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return weights.get_state_dict(progress=False, check_hash=True, weights_only=True, map_location='cpu')
    except Exception as error:  # no network, a proxy's page, a damaged or half-written file in the cache
        reason = _first_line(error)
        raise OSError(f'torchvision:{name}: {weights.url} could not be fetched or read ({reason})') from None


# -------------------------------------------------------------------------------------------------------- writing


def write(f, params, kind, image_size):
    """The bytes of a file that holds a network in another format; see `WRITERS`.

    ImageNet ResNets are folded for upstream, hkl and onnx; wide ResNets, which have no convolution before every batch
    norm, keep theirs: for them upstream and hkl hold the flat params as they are.
    Raises ValueError for what the format cannot hold, and where a package is missing.
    """
    imagenet = f is resnet.imagenet_forward
    if kind == 'torchvision' and not imagenet:
        raise ValueError('torchvision has no wide ResNets of this kind: --to torchvision is for ImageNet ResNets')
    if imagenet and kind in ('upstream', 'hkl', 'onnx'):
        params = resnet.fold_batch_norm(params)
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
