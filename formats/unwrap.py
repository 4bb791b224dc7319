"""The params of one network in a file's content: in dictionaries, behind prefixes, beside other networks."""

import re

import torch

# Names under which files hold a network's params; those averaged over training are preferred, as in timm.
PARTS = ('params', 'state_dict', 'model_state_dict', 'model', 'net', 'network', 'module', 'student')
AVERAGED = ('ema', *(f'{part}_ema' for part in PARTS))
MAX_NETWORKS = 10  # in one file


def flat_params(state, path, first, note):
    """The params of the network in a file's content, in any dictionaries and behind any prefixes.

    `first` are patterns, one of which matches a name in each network's first block. `note` takes a line for the user.
    Raises ValueError for anything but named tensors, and for several networks.
    """
    if not isinstance(state, dict):
        raise ValueError(f'{path} is not a checkpoint: it holds a {type(state).__name__}, not a dictionary')
    params = _unwrapped(state, path, note)
    for key, value in params.items():
        if not isinstance(key, str) or not key.isprintable() or not _is_plain(value):
            raise ValueError(f'{path} is not a checkpoint: {str(key)[:100]!r} in it is not a named tensor')
    return _without_prefix(params, path, first, note)


def _unwrapped(state, path, note):
    """The innermost dictionary under names that files use for params, with the statistics beside it.

    Weights averaged over training are preferred to plain ones, as in timm; `note` says so if a file has both.
    """
    for _ in range(MAX_NETWORKS):  # a dictionary that holds itself has no innermost one
        parts = [k for k in PARTS if isinstance(state.get(k), dict)]
        averaged = [k for k in AVERAGED if isinstance(state.get(k), dict) and state[k]]
        if averaged and parts:
            _note_averaged(note, path, averaged[0], parts[0])
        if not averaged + parts:
            return state
        stats = state.get('stats')
        state = {**state[(averaged + parts)[0]], **(stats if isinstance(stats, dict) else {})}
    raise ValueError(f'{path} is not a checkpoint: it has dictionaries in dictionaries without end')


def _without_prefix(params, path, first, note):
    """The network among flat params, by its own names.

    Wrappers add prefixes (DataParallel `module.`, torch.compile `_orig_mod.`, Lightning the user's attribute names),
    and may hold other things besides the network: losses, a teacher, an average of it. Raises ValueError if several
    networks remain.
    """
    named = re.compile(rf'(.*\.|)(?:{"|".join(first)})', re.DOTALL)
    prefixes = {match[1] for match in map(named.fullmatch, params) if match}
    if not prefixes:
        return params
    chosen = {p for p in prefixes if 'teacher' not in p} or prefixes
    averaged = {p for p in chosen if re.search(r'(^|[._])ema[._]', p)}
    if averaged and averaged != chosen:
        _note_averaged(note, path, min(averaged), min(chosen - averaged))
    chosen = sorted(averaged or chosen)
    if len(prefixes) > MAX_NETWORKS or (len(chosen) > 1 and '' not in chosen):
        raise ValueError(
            f'{path} holds several networks ({some([p[:99] for p in chosen])}): save the state_dict of one of them'
        )
    prefix = chosen[0]
    others = tuple(p for p in prefixes if len(p) > len(prefix) and p.startswith(prefix))
    return {k.removeprefix(prefix): v for k, v in params.items() if k.startswith(prefix) and not k.startswith(others)}


def _note_averaged(note, path, averaged, plain):
    note(f'note: {path} holds plain weights ({plain[:99]}) and averaged ones ({averaged[:99]}): the latter are used')


def _is_plain(value):
    """Whether a value is a dense CPU tensor whose storage holds each of its bytes."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type != 'cpu':
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def some(texts):
    """The first three of a list of texts, and how many more there are."""
    return '; '.join(texts[:3]) + (f' and {len(texts) - 3} more' if len(texts) > 3 else '')
