"""Runs of any of the scripts beside each other, from their logs alone: errors, and differences paired by seed."""

import os
from itertools import combinations

from engine.flags import parse_cifar
from engine.log import last_record
from engine.runs import settings
from engine.series import PHOTOGRAPHS, errors, method_of, network_of, read_run, shorten, term_of
from engine.table import DIFFERENCES, is_whole, line, paired, plain, protocols, summary

# What a log's record has besides settings and the terms of its loss.
RESULTS = {
    *'epoch train_loss train_acc test_loss test_acc train_time test_time at_losses lr_now beta_now'.split(),
    *'images_per_second bad_images num_classes classes train_images test_images n_parameters'.split(),
    *'torch device commit seed'.split(),
}
# Settings that are named wherever the runs of a network differ in them, and not only those of one method.
SCHEDULE = {*'epochs epoch_step batch_size lr lr_decay_ratio weight_decay dtype workers'.split()}


def comparison(paths):
    """Two tables in Markdown, as lines: test errors of the last epoch by method, and their differences paired by seed.

    paths: runs, as for `read_run`. The methods of a network are compared on the same images. Runs of one method that
    differ in other settings are named by these. Runs that are not finished are left out, and named. Raises ValueError
    for two runs of equal settings and seed, and for a log that lacks what a table needs, and what `read_run` raises.
    """
    records = {path: _last(path) for path in dict.fromkeys(map(os.path.normpath, paths))}
    done = {path: record for path, record in records.items() if record['epoch'] == record['epochs']}
    unfinished = [f'Not finished: {plain(path)}.' for path in records if path not in done]
    if not done:
        return unfinished
    lines, pairs = [line(['network', 'method', 'median error, %', 'spread', 'seeds']), '|---' * 5 + '|'], []
    for network, methods in _named(done).items():
        lines += [line([network, _title(label), *summary(of_seed)]) for label, of_seed in methods.items()]
        for (base, others), (label, of_seed) in combinations(methods.items(), 2):
            found = paired(of_seed, others)
            pairs += [line([network, f'{_title(label)} - {_title(base)}', *found])] if found else []
    lines += ['', line(['network', *DIFFERENCES]), '|---' * 5 + '|', *pairs] if pairs else []
    return [*lines, '', *(f'{way}.' for way in protocols(done.values())), *unfinished]


def _last(path):
    """The last record of a run, with what a table needs: an image set as `dataset`, and the top-1 accuracy."""
    record = last_record(read_run(path))
    root, own = record.get('imagenetpath', record.get('dataroot')), record.get('dataset', 'folder')
    own_is_folder = own == 'folder' and isinstance(root, str)
    own = os.path.basename(os.path.normpath(root)) if own_is_folder else own
    sized = own_is_folder or any(key in record for key in PHOTOGRAPHS)
    data = f'{own} at {str(record.get("image_size"))[:9]} pixels' if sized else own
    record = {'holdout': 0, **record, 'dataset': data, 'test_acc': 100 - errors([record], 'test')[0]}
    if not is_whole(record) or type(record.get('seed')) is not int or not network_of(record):
        raise ValueError(f'{path}: its log lacks what a table needs, among it the seed and the number of epochs')
    return record


def _named(records):
    """Records {path: last record} by network, method and seed: {network: {label: {seed: error in percent}}}.

    A label is a tuple: the method, the settings in which its runs differ, and those of `SCHEDULE` in which any runs of
    the network do. With several sets of test images, a network's name has the set. Methods are in order: alone, single
    ones, others.
    """
    several, found = len(set(map(_images, records.values()))) > 1, {}
    networks, kinds, schedules = {}, {}, {}
    for path, record in records.items():
        network = network_of(record) + plain(f' on {_images(record)}') * several
        networks.setdefault(network, {})[path] = record
        kinds.setdefault((network, method_of(record)), {})[path] = record
    for runs in networks.values():
        schedules |= {path: [s for s in varied if s[0] in SCHEDULE] for path, varied in _varied(runs).items()}
    for network, method in sorted(kinds, key=lambda kind: (kind[1] != 'alone', kind[1].count('+'))):
        for path, varied in _varied(kinds[network, method]).items():
            label = method, *dict.fromkeys(varied + schedules[path])
            of_seed = found.setdefault(network, {}).setdefault(label, {})
            seed = records[path]['seed']
            if seed in of_seed:
                raise ValueError(f'{path}: another run has the same settings and the seed {seed}')
            of_seed[seed] = 100 - records[path]['test_acc']
    return found


def _images(record):
    """The images that a record was tested on, in words."""
    return f'{record["dataset"]}, {record["test_images"]:,} {"held-out " * bool(record["holdout"])}images'


def _varied(runs):
    """The settings in which runs {path: record} differ: {path: [(flag, value), ...]}.

    A flag that an older log lacks has its default.
    """
    defaults, of_run = vars(parse_cifar('', [])), [settings(record) for record in runs.values()]
    keys = {key: None for found in of_run for key in found if key not in RESULTS and not term_of(key)}
    known = [key for key in keys if key in defaults or all(key in found for found in of_run)]
    values = [{key: found.get(key, defaults.get(key)) for key in known} for found in of_run]
    values = [{key: v if isinstance(v, int | float | str) else repr(v) for key, v in of.items()} for of in values]
    varied = [key for key in known if len({of[key] for of in values}) > 1]
    return {path: [(key, of[key]) for key in varied] for path, of in zip(runs, values)}


def _title(label):
    """A label of `_named` in words."""
    method, *varied = label
    values = ((key, f'{v:g}' if isinstance(v, float) else str(v) or 'default') for key, v in varied)
    return plain(', '.join([method, *(shorten(f'{key} {value}') for key, value in values)]))
