"""Curves show what the logs say, attention maps what the networks compute, and both are legible."""

import csv
import json
import math

import numpy as np
import pytest
from conftest import refused

import plot
from engine import series

NAN = math.nan


def ours(epoch, **more):
    """A line of one of our logs: AT and KD, with a rate that drops at the start of epochs 3 and 5."""
    settings = {'epoch': epoch, 'epoch_step': '[3,5,60]', 'lr': 0.1, 'beta_now': 1000.0, 'at_losses': [[9.0, 0.1]]}
    results = {'train_loss': 2.0, 'test_loss': 1.0, 'train_acc': 50.0 + epoch, 'test_acc': 60.0 + epoch}
    return {**settings, **results, 'ce': 1.0 / epoch, 'kd': 2.0 / epoch, 'at1': 1e-4 / epoch, **more}


def authors(epoch, **more):
    """A line of a log of the authors' imagenet.py: accuracies are pairs, terms have no names."""
    return {
        'epoch': epoch, 'epoch_step': '[3]', 'lr': 0.1, 'train_loss': 2.0, 'test_loss': 1.0,
        'train_acc': [40.0 + epoch, 80.0], 'test_acc': [45.0 + epoch, 85.0],
        'at_losses': [[1e-5 * epoch, 1e-7], [NAN, NAN], [0.0, 0.0]], **more,
    }  # fmt: skip


@pytest.fixture
def log(tmp_path):
    """Write a run's log: log(name, records) -> its folder."""

    def write(name, records):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / 'log.txt').write_text(''.join(f'json_stats: {json.dumps(r)}\n' for r in records))
        return str(folder)

    return write


def lines(axes, style):
    return [line for line in axes.get_lines() if line.get_linestyle() == style]


def drops(axes):
    return {line.get_xdata()[0]: line.get_color() for line in lines(axes, ':')}


def panels(figure):
    return {axes.get_title(): axes for axes in figure.axes}


# ----------------------------------------------------------------------------------------------------------- curves


def test_errors_are_100_minus_the_accuracies_of_both_kinds_of_log(log):
    paths = [log('a', [ours(e) for e in range(1, 8)]), log('b', [authors(e) for e in range(1, 5)])]
    axes = panels(plot.draw_curves(paths))['error']
    (test_a, test_b), (train_a, train_b) = lines(axes, '-'), lines(axes, '--')
    assert list(test_a.get_xdata()) == list(range(1, 8)) and list(test_b.get_xdata()) == list(range(1, 5))
    assert list(test_a.get_ydata()) == [40 - e for e in range(1, 8)]
    assert list(train_a.get_ydata()) == [50 - e for e in range(1, 8)]
    assert list(test_b.get_ydata()) == [55 - e for e in range(1, 5)]  # top-1
    assert list(train_b.get_ydata()) == [60 - e for e in range(1, 5)]
    assert test_a.get_color() == train_a.get_color() != test_b.get_color() == train_b.get_color()
    assert test_a.get_linewidth() > train_a.get_linewidth()


def test_the_last_errors_of_all_runs_are_within_the_axis(log):
    falling = [ours(e, test_acc=100 - max(90 - 20 * e, 8), train_acc=100 - max(90 - 20 * e, 0.1)) for e in range(1, 9)]
    axes = panels(plot.draw_curves([log('a', falling), log('b', [ours(1, test_acc=90, train_acc=95)])]))['error']
    low, high = axes.get_ylim()
    assert 0 <= low <= 0.1 and 10 < high < 70  # the first epochs lie above


def test_each_named_term_has_a_logarithmic_panel_in_order(log):
    more = {'full0': 0.1, 'at0': 0.2, 'grad': 0.3, 'min_l2': 0.4, 'symmetry': 0.5, 'beta_now': 1.0, 'attempt1': 1.0}
    path = log('a', [ours(e, **more) for e in (1, 2)])
    shown = panels(plot.draw_curves([path]))
    terms = ['ce', 'kd', 'at0', 'at1', 'full0', 'grad', 'symmetry', 'min_l2']
    assert list(shown) == ['error'] + [f'loss term {name}' for name in terms]
    assert all(axes.get_yscale() == 'log' for name, axes in shown.items() if name != 'error')
    (line,) = lines(shown['loss term ce'], '-')
    assert list(line.get_ydata()) == [1.0, 0.5]


def test_the_terms_of_an_authors_log_are_the_means_of_its_at_losses_where_they_are_numbers(log):
    shown = panels(plot.draw_curves([log('a', [authors(e) for e in (1, 2, 3)])]))
    assert list(shown) == ['error', 'loss term at0']  # the others are NaN, or 0, which a logarithmic axis cannot show
    assert list(lines(shown['loss term at0'], '-')[0].get_ydata()) == [1e-5 * e for e in (1, 2, 3)]
    alone = [authors(e, at_losses=[[NAN, NAN]] * 3) for e in (1, 2)]
    assert list(panels(plot.draw_curves([log('b', alone)]))) == ['error']


def test_the_lowest_panel_of_each_column_names_its_axis_and_no_tick_covers_another(log):
    """With five terms the second column has one panel less; a term that falls far has one tick per decade."""
    more = {'at0': 0.2, 'at2': 0.3}
    figure = plot.draw_curves([log('a', [ours(e, **more, kd=10.0 ** (1 - e)) for e in range(1, 7)])])
    named = {title for title, axes in panels(figure).items() if axes.get_xlabel()}
    assert named == {'error', 'loss term at1', 'loss term at2'}
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = [tick.label1.get_window_extent() for tick in axes.yaxis.get_major_ticks() if tick.label1.get_text()]
        boxes = [box for box in boxes if axes.bbox.y0 <= box.y0 + box.height / 2 <= axes.bbox.y1]
        assert len(boxes) > 1 and not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_run_stands_only_in_the_panels_of_its_own_terms(log):
    student = [{k: v for k, v in ours(e).items() if k not in ('kd', 'at1')} for e in (1, 2)]
    shown = panels(plot.draw_curves([log('student', student), log('at', [ours(1), ours(2)])]))
    assert len(lines(shown['loss term ce'], '-')) == 2 and len(lines(shown['loss term kd'], '-')) == 1
    assert lines(shown['loss term kd'], '-')[0].get_color() == lines(shown['error'], '-')[1].get_color()


def test_a_value_that_is_not_finite_is_a_gap(log):
    values = [1.0, None, 3.0, NAN, 10**400]
    path = log('a', [ours(e, ce=v, test_acc=v) for e, v in enumerate(values, 1)])
    shown = panels(plot.draw_curves([path]))
    np.testing.assert_array_equal(lines(shown['error'], '-')[0].get_ydata(), [99, NAN, 97, NAN, NAN])
    np.testing.assert_array_equal(lines(shown['loss term ce'], '-')[0].get_ydata(), [1, NAN, 3, NAN, NAN])


def test_the_rate_drops_where_the_epoch_before_ends_and_only_within_the_run(log):
    figure = plot.draw_curves([log('a', [ours(e) for e in range(1, 8)])])
    assert all(set(drops(axes)) == {2, 4} for axes in figure.axes) and len(figure.axes) == 4


def test_a_drop_of_one_run_among_several_has_its_colour(log):
    paths = [log('a', [ours(e) for e in range(1, 8)]), log('b', [authors(e) for e in range(1, 5)])]
    axes = panels(plot.draw_curves(paths))['error']
    assert drops(axes) == {2: '0.3', 4: lines(axes, '-')[0].get_color()}


def test_of_a_repeated_epoch_the_last_line_counts(log):
    path = log('a', [ours(1), ours(3), ours(2, test_acc=1), ours(2, test_acc=70)])
    (line,) = lines(panels(plot.draw_curves([path]))['error'], '-')
    assert list(line.get_xdata()) == [1, 2, 3] and list(line.get_ydata()) == [39, 30, 37]


def test_a_single_epoch_can_be_seen(log):
    axes = panels(plot.draw_curves([log('a', [ours(1)])]))['error']
    assert all(line.get_marker() == '.' for line in lines(axes, '-') + lines(axes, '--'))
    assert all(tick % 1 == 0 for tick in axes.get_xticks())


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_label_is_the_name_of_the_folder_and_the_last_test_error_if_the_log_names_no_network(log):
    path = log('cost_$5$', [ours(1), ours(2, test_acc=91.234)])
    for given in (path, path + '/', path + '/log.txt'):
        assert legend(plot.draw_curves([given])) == [r'cost_\$5\$ (8.77%)']


SHAPE = {'net': 'wrn', 'depth': 16, 'width': 1.0}


@pytest.mark.parametrize(
    ('more', 'name'),
    [
        ({}, 'WRN-16-1, alone'),
        ({'beta': 1e3, 'alpha': 0}, 'WRN-16-1, AT'),
        ({'beta': 1e3, 'alpha': 0.9, 'transfer': 'activation'}, 'WRN-16-1, AT+KD'),
        ({'beta': 1e5, 'transfer': 'full', 'width': 0.5}, 'WRN-16-0.5, F-ActT, constant beta'),
        ({'beta': 1e5, 'transfer': 'full', 'beta_decay': 'linear'}, 'WRN-16-1, F-ActT'),
        ({'alpha': 0.9}, 'WRN-16-1, KD'),
        ({'beta': 1e3, 'control': 'shifted'}, 'WRN-16-1, AT, maps of another image'),
        ({'beta': 1e3, 'control': ['x']}, 'WRN-16-1, AT'),
        ({'gamma': 0.1, 'penalty': 'min_l2', 'net': 'nin', 'width': 0.4375}, 'NIN-0.4375, min-l2'),
        ({'net': None, 'imagenetpath': 'x', 'depth': 18, 'beta': 1e3}, 'ResNet-18, AT'),
        ({'net': None, 'pretrained': 'x', 'depth': 18, 'width': None}, 'ResNet-18, alone'),
        ({'net': 'other'}, 'run'),
        ({'net': ['wrn']}, 'run'),
        ({'depth': 'deep'}, 'run'),
        ({'depth': 10**400, 'transfer': [3], 'penalty': {}, 'beta': 'x'}, 'run'),
        ({'transfer': [3], 'beta': 1.0}, 'WRN-16-1, [3]'),
        ({'transfer': 'gram\n', 'beta': 1.0, 'alpha': 0.9}, 'WRN-16-1, gram+KD'),
        ({'penalty': 'none', 'gamma': 0.1}, 'WRN-16-1, alone'),
        ({'penalty': 'l1', 'gamma': 0.1}, 'WRN-16-1, l1'),
    ],
)
def test_a_run_is_called_by_its_network_and_its_method(log, more, name):
    record = {key: value for key, value in ours(1, **{**SHAPE, **more}).items() if value is not None}
    path = log('run', [record])
    assert series.names_of([path], [series.read_run(path)]) == [name]


def test_runs_of_equal_names_are_told_apart_by_their_seeds_or_their_folders(log):
    def names(*seeds):
        runs = [[ours(1, **SHAPE, seed=seed)] for seed in seeds]
        return series.names_of(['logs/alone', 'one/run', 'two/run'][: len(runs)], runs)

    assert names(0, 1) == ['WRN-16-1, alone, seed 0', 'WRN-16-1, alone, seed 1']
    assert names(0, 0) == ['alone', 'run']
    assert names(1, 0, 0) == ['logs/alone', 'one/run', 'two/run']
    long = 'x' * 100
    assert series.names_of(['a', 'b'], [[ours(1)]] * 2, ['AT', long]) == ['AT', long]
    assert plot.name_of('logs/at/log.txt') == 'at'


def test_a_long_label_is_shortened(log):
    assert legend(plot.draw_curves([log('x' * 100, [ours(1)])]))[0].startswith('x' * 30 + '…' + 'x' * 30)


def test_the_last_fifth_of_a_long_run_has_a_panel_of_its_own(log):
    long, short = log('long', [ours(e, ce=1) for e in range(1, 31)]), log('short', [ours(e, ce=1) for e in (1, 2)])
    figure = plot.draw_curves([long, short])
    axes = panels(figure)['test error from epoch 24 on']
    (line,) = lines(axes, '-')
    assert list(line.get_xdata()) == list(range(24, 31)) and list(line.get_ydata()) == [40 - e for e in range(24, 31)]
    assert axes.get_xlim()[0] > 20 and line.get_color() == lines(panels(figure)['error'], '-')[0].get_color()
    assert not any('from epoch' in title for title in panels(plot.draw_curves([short])))


def test_training_errors_can_be_left_out(script, log, monkeypatch):
    figures, path = [], log('a', [ours(e) for e in (1, 2)])
    monkeypatch.setattr(plot, 'write', lambda figure, out: figures.append(figure))
    assert script(plot, 'curves', [path], '--test_only')[0] == script(plot, 'curves', [path])[0] == 0
    assert [len(lines(panels(figure)['error'], '--')) for figure in figures] == [0, 1]
    assert [len(panels(figure)['error'].get_legend().get_texts()) for figure in figures] == [1, 2]


def test_csv_has_a_line_for_each_epoch_of_each_log_and_a_column_for_each_number(script, log):
    hostile = {'run': 'evil', 'a\x1b': '\ud800', 'deep': [[[1]]]}
    paths = [log('a', [ours(1, classes=['x', 'y']), ours(2, **hostile)]), log('b', [authors(1)])]
    status, out, err = script(plot, 'csv', paths)
    assert (status, err) == (0, '')
    rows = list(csv.DictReader(out.splitlines()))
    assert [(row['run'], row['epoch']) for row in rows] == [(paths[0], '1'), (paths[0], '2'), (paths[1], '1')]
    assert [row['test_acc'] for row in rows] == ['61.0', '62.0', ''] and rows[0]['ce'] == '1.0'
    assert (rows[2]['test_acc_0'], rows[2]['test_acc_1'], rows[2]['at_losses_0_0']) == ('46.0', '85.0', '1e-05')
    assert out.splitlines()[0].startswith('run,epoch,') and 'classes' not in out and rows[0]['epoch_step'] == '[3,5,60]'
    assert rows[1]['a?'] == '?' and '\x1b' not in out and 'deep' not in out
    assert script(plot, 'csv', paths, '--out runs.csv')[1] == '' and open('runs.csv').read() == out
    assert refused(script(plot, 'csv nowhere'), 'nowhere: no such log')


def test_a_table_of_more_cells_than_memory_bears_is_refused(script, log):
    paths = [log('wide', [{'epoch': i, 'test_acc': 1.0, f'k{i}': 1} for i in range(1, 4001)])]
    assert refused(script(plot, 'csv', paths), '4,000 lines with 4,00', 'are too many for a table')


def test_a_label_for_each_log_stands_in_the_legend(script, log):
    paths = [log(name, [ours(1), ours(2)]) for name in ('a', 'b')]
    labels = ['--label', 'F-ActT, 5 $', '--label', 'KD']
    assert script(plot, 'curves', paths, labels, '--out curves.svg')[0] == 0
    words = open('curves.svg', encoding='utf-8').read()
    assert 'F-ActT, 5 $' in words and 'KD (' in words
    assert refused(script(plot, 'curves', paths, labels[:2]), '--label: 1 labels for 2 logs')


def test_ten_runs_look_different_and_no_text_leaves_the_picture_or_covers_another(log):
    paths = [log(f'run-{"abcdefghij"[i]}-with-a-rather-long-name-{i}', [ours(e) for e in (1, 2)]) for i in range(10)]
    figure = plot.draw_curves(paths)
    looks = {(h.get_color(), h.get_marker()) for h in figure.legends[0].get_lines()}
    assert len(looks) == 10
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.legends[0].get_texts()]
    boxes += [axes.get_tightbbox() for axes in figure.axes]
    assert all(figure.bbox.x0 <= b.x0 and b.x1 <= figure.bbox.x1 for b in boxes)
    assert all(figure.bbox.y0 <= b.y0 and b.y1 <= figure.bbox.y1 for b in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        ('', ['has no line of results']),
        ('no results here\n', ['has no line of results']),
        ('json_stats: {bad\njson_stats: {}\n', ['line 1', 'json_stats is not followed by a JSON object']),
        ('json_stats: {"test_acc": 90}\n', ['has a line without an epoch']),
        ('json_stats: {"epoch": [1], "test_acc": 90}\n', ['has a line without an epoch']),
        ('json_stats: {"epoch": 1, "train_acc": null}\n', ['neither train_acc nor test_acc']),
        ('json_stats: {"epoch": 1, "test_acc": 9, "epoch_step": "[6"}\n', ['epoch_step is not a JSON list']),
        ('json_stats: {"epoch": 1, "test_acc": 9, "epoch_step": 60}\n', ['epoch_step is not a JSON list']),
    ],
)
def test_a_log_without_results_is_refused_by_name(script, tmp_path, content, words):
    (tmp_path / 'some.txt').write_text(content)
    assert refused(script(plot, 'curves some.txt'), 'some.txt', *words)
    assert not (tmp_path / 'curves.png').exists()


def test_a_log_with_more_terms_or_drops_than_a_picture_can_show_is_refused(script, log):
    terms = {f'at{i}': 0.1 for i in range(900)}
    assert refused(script(plot, 'curves', [log('a', [ours(1, **terms)])]), 'loss terms; at most 40 are drawn')
    drops = json.dumps(list(range(1, 10**5)))
    assert refused(script(plot, 'curves', [log('b', [ours(1, epoch_step=drops)])]), '99,999 epochs; at most 1000')


def test_a_run_is_also_named_as_in_logs(script, log):
    log('logs/mine', [ours(1), ours(2)])
    assert script(plot, 'csv mine')[1] == script(plot, 'csv logs/mine')[1].replace('logs/mine', 'mine') != ''
