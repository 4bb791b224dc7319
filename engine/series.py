"""Runs as series of numbers over epochs, and what they are called: what plot.py shows of logs."""

import json
import math
import os
import re

from engine.arguments import printable
from engine.log import read_log
from engine.paper import CONTROLS
from engine.transfer import PENALTIES, TRANSFERS
from formats.networks import NETWORKS, file_of

MOST_DROPS = 1000
PHOTOGRAPHS = 'imagenetpath', 'pretrained'  # one of them is in each log of imagenet.py and finetune.py


def read_run(path):
    """The records of a run, by its folder, name in logs/ or log: one dictionary per epoch, in order.

    Of a repeated epoch it is the last. Raises OSError if there is no log and ValueError if it is empty or damaged.
    """
    log = file_of(path, 'log.txt')
    if not os.path.isfile(log):
        raise OSError(f'{log}: no such log; expected the folder of a run, its name in logs/, or a log')
    records = read_log(log)
    if not records:
        raise ValueError(f'{log} has no line of results (json_stats: ...)')
    if not all(type(r.get('epoch')) is int and 0 < r['epoch'] < 10**6 for r in records):
        raise ValueError(f'{log} has a line without an epoch')
    records = [record for _, record in sorted({record['epoch']: record for record in records}.items())]
    if all(map(math.isnan, errors(records, 'train') + errors(records, 'test'))):
        raise ValueError(f'{log} has neither train_acc nor test_acc')
    try:
        rate_drops(records)
    except ValueError as error:
        raise ValueError(f'{log}: {error}') from None
    return records


def _number(value):
    """A logged number, of a list the first; NaN for anything else, like the null that stands for infinity."""
    value = value[0] if isinstance(value, list) and value else value
    return float(value) if type(value) in (int, float) and abs(value) < 1e300 else math.nan


def errors(records, part):
    """Top-1 error in percent of each epoch; part is 'train' or 'test'."""
    return [100 - _number(record.get(f'{part}_acc')) for record in records]


def loss_terms(records):
    """The unweighted terms of a run's loss: {name: one number per epoch}, NaN where it is not above 0.

    They are the keys that `term_of` knows, or in the authors' logs, which have no `ce`, the means in `at_losses`.
    """

    def terms(record):
        named = {key: _number(value) for key, value in record.items() if term_of(key)}
        if 'ce' not in record and isinstance(record.get('at_losses'), list):
            named = {f'at{i}': _number(mean) for i, mean in enumerate(record['at_losses'])} | named
        return {key: value for key, value in named.items() if value > 0}

    rows = [terms(record) for record in records]
    return {key: [row.get(key, math.nan) for row in rows] for key in sorted(set().union(*rows), key=term_of)}


def term_of(key):
    """The sort key of a loss term by its key in a log: (position, number of the group); None for another key.

    Terms are ce, kd, those of TRANSFERS, followed by the number of their group if they have one, and the penalties.
    """
    order = ['ce', 'kd', *(row.term for row in TRANSFERS.values()), *PENALTIES]
    grouped = [row.term for row in TRANSFERS.values() if not row.at_image]
    match = re.fullmatch(rf'({"|".join(grouped)})(\d{{1,3}})', key)
    if match:
        return order.index(match[1]), int(match[2])
    return (order.index(key), 0) if key in order and key not in grouped else None


def rate_drops(records):
    """The epochs at whose start a run's learning rate drops, up to its last. Raises ValueError if they are no list."""
    steps = records[-1].get('epoch_step', [])
    try:
        steps = json.loads(steps) if isinstance(steps, str) else steps
        if not isinstance(steps, list) or not all(type(step) is int for step in steps):
            raise TypeError
    except (ValueError, TypeError, RecursionError):
        raise ValueError('its epoch_step is not a JSON list of epochs') from None
    if len(steps) > MOST_DROPS:
        raise ValueError(f'its epoch_step has {len(steps):,} epochs; at most {MOST_DROPS} are drawn')
    return [step for step in steps if 0 < step <= records[-1]['epoch']]


def method_of(record):
    """The method that a log's record was trained with, as in AT, F-ActT, KD, AT+KD; 'alone' without any.

    A method that this code does not have is called by its name in the log.
    """

    def label(table, name, weight):
        kind = table.get(name) if isinstance(name, str) else None
        if name == 'none' or not _number(record.get(weight)) > 0:
            return []
        if not kind:  # the log is of other code
            return [' '.join(printable(str(name)[:40]).split())]
        constant = record.get('beta_decay', 'none') == 'none' != getattr(kind, 'beta_decay', 'none')
        return [f'{kind.label}, constant beta' if constant else kind.label]

    labels = label(TRANSFERS, record.get('transfer', 'activation'), 'beta')
    control = CONTROLS.get(f'at-{record.get("control")}')  # of examples/controls.py
    labels = [control] if control and labels else labels
    labels += ['KD'] if _number(record.get('alpha')) > 0 else []
    return '+'.join(labels + label(PENALTIES, record.get('penalty'), 'gamma')) or 'alone'


def network_of(record):
    """The network of a log's record, as in WRN-16-1, ResNet-18 or NIN-0.4375; '' if the log does not say."""
    photographs = any(key in record for key in PHOTOGRAPHS)
    family = NETWORKS.get(str(record.get('net', 'resnet' if photographs else 'wrn')))
    numbers = [_number(record.get(flag)) for flag in ('depth', 'width') if family and flag in family.flags]
    if photographs and numbers[1:] in ([1], [math.nan]) or len(numbers) == 2 and math.isnan(numbers[1]):
        numbers = numbers[:1]
    if not numbers or any(map(math.isnan, numbers)):
        return ''
    return '-'.join([family.title, *(f'{number:g}' for number in numbers)])


def names_of(paths, runs, labels=()):
    """The names of runs: the labels if given, else their networks and methods, with seeds if some are equal.

    If they are still equal, or a log does not say, the names are those of the folders, or the paths if some are equal.
    Raises ValueError if there are not as many labels as runs.
    """
    if labels:
        if len(labels) != len(paths):
            raise ValueError(f'--label: {len(labels)} labels for {len(paths)} logs')
        return list(labels)
    described = [(network_of(run[-1]), method_of(run[-1])) for run in runs]
    names = [f'{network}, {method}' for network, method in described]
    if len(set(names)) < len(names):
        names = [f'{name}, seed {_number(run[-1].get("seed")):g}' for name, run in zip(names, runs)]
    if len(set(names)) == len(names) and all(network for network, _ in described):
        return names
    names = [name_of(path) for path in paths]
    return names if len(set(names)) == len({os.path.abspath(path) for path in paths}) else list(map(str, paths))


def shorten(name, length=60):
    """A name without its middle if it is longer than `length`."""
    return name if len(name) <= length else f'{name[: length // 2]}…{name[-length // 2 :]}'


def name_of(path):
    """The name of a run or file: the folder's, also for its log.txt or model.pt7; else the file's."""
    folder, name = os.path.split(os.path.abspath(path))
    return (os.path.basename(folder) if name in ('log.txt', 'model.pt7') else name) or path


def flat(record, depth=2):
    """A record with a key for each number of its lists and of lists in these, as in test_acc_0 and at_losses_0_1.

    Texts in lists, deeper lists and dictionaries are left out.
    """
    values = {key: value for key, value in record.items() if not isinstance(value, list | dict)}
    for key, value in record.items() if depth else ():
        if isinstance(value, list):
            numbers = {f'{key}_{i}': item for i, item in enumerate(value) if type(item) in (int, float, list)}
            values |= flat(numbers, depth - 1)
    return values
