"""The names of torchvision's ResNets, which timm shares, and Hugging Face's; the download of torchvision's weights."""

import re
import warnings

import torch

from formats.faults import told
from formats.read import first_line
from imagenet_resnet import IMAGENET_DEPTHS, NORM, imagenet_resnet_shape


def from_torchvision(state):
    """A torchvision ResNet's state_dict under the names of `imagenet_resnet`, without num_batches_tracked.

    conv1.weight -> conv0, bn1.* -> bn0.*, layer1.0.conv1.weight -> group0.block0.conv0, downsample.0.weight ->
    convdim, downsample.1.* -> bndim.*, and a last layer after dropout, fc.1.* -> fc.*. Other names stay. Raises
    ValueError if two names become one.
    """
    params, state = {}, _plain_fc(state)
    for key, value in state.items():
        name = _our_name(key)
        if name in params:
            raise ValueError(f'{key} appears twice')
        if not key.endswith('.num_batches_tracked'):
            params[name] = value
    return params


def _plain_fc(state):
    """The state with the only linear layer of a Sequential `fc` named fc: the layers beside it have no weights."""
    inside = {key: re.fullmatch(r'fc\.\d{1,2}\.(weight|bias)', key) for key in state if key.startswith('fc.')}
    if not all(inside.values()) or sorted(match[1] for match in inside.values()) != ['bias', 'weight']:
        return state
    return {f'fc.{inside[key][1]}' if key in inside else key: value for key, value in state.items()}


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


def from_transformers(state):
    """The params of Hugging Face's ResNetForImageClassification under the names of torchvision.

    embedder.embedder.convolution -> conv1, encoder.stages.0.layers.0.layer.0.convolution -> layer1.0.conv1, shortcut ->
    downsample, classifier.1 -> fc, and each normalization likewise. Other names stay. Raises ValueError if two names
    become one.
    """
    params = {}
    for key, value in state.items():
        name = _torchvision_name_of_transformers(key)
        if name in params:
            raise ValueError(f'{key} appears twice')
        params[name] = value
    return params


def _torchvision_name_of_transformers(key):
    place = r'embedder\.embedder|encoder\.stages\.([0-3])\.layers\.(\d{1,2})\.(?:(shortcut)|layer\.([0-2]))'
    match = re.fullmatch(rf'resnet\.(?:{place})\.(convolution|normalization)\.(\w+)', key)
    if not match:
        return re.sub(r'^classifier\.1\.', 'fc.', key)
    stage, block, shortcut, number, kind, part = match.groups()
    base = f'layer{int(stage) + 1}.{block}.' if stage else ''
    if shortcut:
        return f'{base}downsample.{int(kind == "normalization")}.{part}'
    return f'{base}{"conv" if kind == "convolution" else "bn"}{int(number or 0) + 1}.{part}'


def to_torchvision(params):
    """The params of an ImageNet ResNet, folded or not, as the state_dict of a torchvision ResNet.

    Folded params get a batch norm that only adds their bias, shortcuts without batch norm one that does nothing. Names
    are converted as in `from_torchvision`. Raises ValueError for numbers of blocks that torchvision does not have.
    """
    depth, counts, _ = imagenet_resnet_shape(params)
    if counts != IMAGENET_DEPTHS[depth][0]:
        ours, theirs = ('-'.join(map(str, numbers)) for numbers in (counts, IMAGENET_DEPTHS[depth][0]))
        raise ValueError(f"torchvision's resnet{depth} has {theirs} blocks, not {ours}; --to upstream can hold them")
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
    """Undo the layout of `fold_batch_norm`, though not its arithmetic; params that are not folded stay as they are.

    Each convolution's bias becomes a batch norm of weight 1, mean 0 and variance 1 - eps with that bias, and a
    shortcut without batch norm gets one with bias 0.
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
    """A batch norm after convolution `conv` that only adds a bias (C,)."""
    ones = torch.ones_like(bias)
    norm = ones, bias, torch.zeros_like(bias), ones - 1e-5
    return {f'{conv.replace("conv", "bn")}.{name}': tensor for name, tensor in zip(NORM, norm)}


def check_name(name):
    """Refuse a name of no network that `download` fetches."""
    names = [f'resnet{depth}' for depth in IMAGENET_DEPTHS]
    if name not in names:
        raise ValueError(f'torchvision:{name}: expected one of {", ".join(f"torchvision:{n}" for n in names)}')


def categories(name):
    """The class names of torchvision's own trained network of that name. Raises ValueError for another name."""
    import torchvision  # slow to import, and no training script needs it

    check_name(name)
    return torchvision.models.get_model_weights(name).DEFAULT.meta['categories']


def download(name):
    """The state_dict of torchvision's own trained network of that name (resnet18, 34, 50, 101 or 152).

    torchvision caches downloads in ~/.cache/torch/hub. Raises ValueError for another name, OSError if the weights
    cannot be fetched or read.
    """
    import torchvision  # slow to import, and no training script needs it

    check_name(name)
    weights = torchvision.models.get_model_weights(name).DEFAULT
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            return weights.get_state_dict(progress=False, check_hash=True, weights_only=True, map_location='cpu')
    except MemoryError:
        raise
    except Exception as error:  # no network, a proxy's page, a damaged or half-written file in the cache
        reason = first_line(error)
        raise told(f'torchvision:{name}: {weights.url} could not be fetched or read ({reason})', error) from None
