"""The table is made of logs alone."""

import json
import math
import pathlib
import re
import shutil
from argparse import Namespace
from functools import partial

import pytest
from conftest import refused
from test_reproduce import RECORD, write_log

import reproduce
from engine import table
from engine.log import read_log

ROOT = pathlib.Path(reproduce.__file__).parent
PUBLISHED = sorted((ROOT / 'logs').glob('*/*/log.txt'))


def test_the_table_shows_median_spread_and_difference_and_marks_what_was_not_run(script):
    for seed, error in enumerate((13.0, 12.0, 12.5)):
        write_log(f'cifar10-e16/wrn-16-1-s{seed}', error)
    write_log('cifar10-e16/wrn-16-1-at-wrn-16-2-s0', 11.0)
    write_log('cifar10-e16/wrn-16-1-kd-wrn-16-2-s0', 10.0, last=15)  # not finished
    status, out, _ = script(reproduce, 'table1 --rows 2 --epochs 16 --show --all')
    rows = {line.split(' | ')[1]: line for line in out.splitlines() if line.startswith('| WRN')}
    assert status == 0
    assert rows['student alone'] == '| WRN-16-1 <- WRN-16-2 | student alone | 12.50 | 12.00 to 13.00 | 0, 1, 2 | 8.77 |'
    assert rows['AT'] == '| WRN-16-1 <- WRN-16-2 | AT | 11.00 |  | 0 | 7.93 |'
    assert rows['KD'] == '| WRN-16-1 <- WRN-16-2 | KD | not run |  |  | 7.41 |'
    assert list(rows) == ['teacher', 'student alone', 'AT', 'F-ActT', 'KD', 'AT+KD']
    assert 'bfloat16, last epoch, tested on 9,980 of 10,000 images' in out


def test_differences_are_paired_by_seed_and_have_a_t_interval(script):
    """1, 2 and 3 have the mean 2 and the standard deviation 1; the quantile of t is 4.303."""
    for seed, (student, at) in enumerate(((13.0, 12.0), (14.0, 12.0), (15.0, 12.0), (9.0, None))):
        write_log(f'cifar10-e16/wrn-16-1-s{seed}', student)
        if at:
            write_log(f'cifar10-e16/wrn-16-1-at-wrn-16-2-s{seed}', at)
    write_log('cifar10-e16/wrn-16-1-kd-wrn-16-2-s0', 10.0)  # one seed: no interval
    _, out, _ = script(reproduce, 'table1 --rows 2 --epochs 16 --show')
    rows = [line for line in out.splitlines() if ' - ' in line]
    assert rows == ['| WRN-16-1 <- WRN-16-2 | AT - student alone | -2.00 | 2.48 | 3 |']
    assert '3 of 6 cells were run.' in out and 'not run' not in out


def test_runs_that_were_tested_on_other_images_are_marked(script):
    write_log('cifar10-e16/wrn-16-1-s0', 8.5)
    assert 'the same images' not in script(reproduce, 'table1 --rows 2 --epochs 16 --show')[1]
    write_log('cifar10-e16/wrn-16-1-s1', 8.5, test_images=10_000)
    _, out, _ = script(reproduce, 'table1 --rows 2 --epochs 16 --show')
    assert '\nNot all of these runs were tested on the same images, but on 10,000 or 9,980.\n' in out


def test_the_difference_to_the_paper_is_given_for_its_schedule_alone(script):
    write_log('cifar10-e200/wrn-16-1-s0', 8.5, epochs=200, last=200)
    _, out, _ = script(reproduce, 'table1 --rows 2 --show')
    assert '| WRN-16-1 <- WRN-16-2 | student alone | 8.50 |  | 0 | 8.77 | -0.27 |' in out


def test_runs_that_differ_in_threads_alone_are_of_one_protocol():
    records = [{**RECORD, 'device': f'AMD EPYC, {n} threads'} for n in (2, 1, 2)]
    assert [line.rpartition('; ')[2] for line in table.protocols(records)] == ['torch 2, AMD EPYC, 1 or 2 threads']
    assert len(table.protocols([*records, {**RECORD, 'device': 'NVIDIA H100'}])) == 2
    assert table.protocols([records[1]])[0].endswith(', 1 thread')


def test_without_epochs_the_table_shows_the_longest_schedule_that_is_there_but_its_own_first(script):
    shown = partial(script, reproduce, 'table1 --rows 2 --methods student --show')
    assert shown()[1] == 'logs/ has no finished run of table1 with 200 epochs.\n'
    write_log('cifar10-e8/wrn-16-1-s0', 14.0, epochs=8, last=8)
    write_log('cifar10-e16/wrn-16-1-s1', 12.0)
    write_log('cifar10-e300/wrn-16-1-s0', 9.0, epochs=300, last=299)  # not finished
    assert '| 12.00 |' in shown()[1] and '| 14.00 |' in shown('--epochs 8')[1]
    write_log('cifar10-e200/wrn-16-1-s0', 10.0, epochs=200, last=200)
    assert '| 10.00 |' in shown()[1]


def test_a_log_that_is_none_of_ours_is_named(script):
    write_log('cifar10-e16/wrn-16-1-s0', 12.0)
    for line in ('{}', json.dumps({**RECORD, 'epoch': 16, 'test_acc': None}), '{"epoch": 16, "test_acc": 90.0}'):
        pathlib.Path('logs/cifar10-e16/wrn-16-1-s0/log.txt').write_text(f'json_stats: {line}\n')
        assert refused(script(reproduce, 'table1 --show'), 'wrn-16-1-s0/log.txt is not a log of cifar.py')


def test_the_table_is_written_between_its_markers_alone(script, tmp_path):
    write_log('cifar10-e16/wrn-16-1-s0', 12.0)
    (tmp_path / 'a.md').write_text('before\n<!-- table1 -->\nold\n<!-- /table1 -->\nafter\n')
    assert script(reproduce, 'table1 --rows 2 --epochs 16 --show --markdown a.md')[0] == 0
    text = (tmp_path / 'a.md').read_text()
    assert text.startswith('before\n<!-- table1 -->\n| student') and text.endswith('\n<!-- /table1 -->\nafter\n')
    assert 'old' not in text and '| 12.00 |' in text
    (tmp_path / 'b.md').write_text('no markers')
    assert refused(script(reproduce, 'table1 --show --markdown b.md'), 'b.md has no lines <!-- table1 -->')
    assert refused(script(reproduce, 'table1 --show --markdown nowhere.md'), 'nowhere.md')


@pytest.mark.parametrize(
    'change, words',
    [
        ({'beta': 10.0}, 'beta 10.0, not 1000.0'),
        ({'seed': 7}, 'seed 7, not 1'),
        (
            {'teacher_id': 'cifar10-e200/wrn-16-2-s0'},
            "teacher_id 'cifar10-e200-wrn-16-2-s0', not ",
        ),
        ({'control': 'another_image'}, "control 'another_image', not ''"),
    ],
)
def test_a_finished_run_with_other_settings_is_not_shown(script, change, words):
    write_log('cifar10-e16/wrn-16-1-at-wrn-16-2-s0', 12.0, seed=0, beta=1000, compile=True)
    write_log('cifar10-e16/wrn-16-1-at-wrn-16-2-s1', 9.0, last=15, **change)  # not finished: not in the table
    assert '| AT | 12.00 |' in script(reproduce, 'table1 --rows 2 --epochs 16 --show')[1]
    shutil.rmtree('logs/cifar10-e16/wrn-16-1-at-wrn-16-2-s1')
    write_log('cifar10-e16/wrn-16-1-at-wrn-16-2-s1', 9.0, **change)
    line = f'wrn-16-1-at-wrn-16-2-s1 holds a run with other settings ({words}'
    assert refused(script(reproduce, 'table1 --rows 2 --epochs 16 --show'), line)


@pytest.mark.parametrize(
    'change',
    [
        {'train_images': None},
        {'dataset': ['CIFAR10']},
        {'test_acc': math.nan},
        {'test_images': '9980'},
        {'epochs': 10**400},
    ],
)
def test_a_log_with_a_value_of_another_kind_is_named(script, change):
    write_log('cifar10-e16/wrn-16-1-s0', 12.0)
    path = 'logs/cifar10-e16/wrn-16-1-s0/log.txt'
    with open(path, 'a', encoding='utf-8') as file:
        file.write(f'json_stats: {json.dumps({**RECORD, "epoch": 16, "test_acc": 88.0, **change})}\n')
    assert refused(script(reproduce, 'table1 --epochs 16 --show'), f'{path} is not a log of cifar.py')


def test_a_rate_that_no_float_holds_is_not_printed():
    assert '(lr times 0.2 at' in table.protocols([{**RECORD, 'lr': 10**400}])[0]


def test_a_sentence_says_which_methods_differ_surely_from_the_student(script):
    errors = {'': 10, '-at': 12, '-kd': 7, '-at-kd': 8}
    for seed in range(3):
        for method, error in errors.items():
            noise = {'-at-kd': 3 * seed - 2, '-kd': 0.1 * seed}.get(method, 0.1 * seed * (method == '-at'))
            write_log(f'cifar10-e16/wrn-16-1{method}{"-wrn-16-2" * bool(method)}-s{seed}', error + noise)

    def words(*flags):
        return table.in_words(Namespace(**{**SHOWN, **dict(flags)}))

    assert words() == (
        'With 3 seeds and 9,980 test images, KD errs less than the student alone; AT errs more than the student alone; '
        'for AT+KD, chance may explain the difference to the student alone '
        '(by the 95 % intervals above, which are about this one teacher and these images).'
    )
    assert words(('seeds', 1)) == words(('methods', ['at', 'kd'])) == words(('epochs', 4)) == ''


SHOWN = {
    'table': 'table1', 'rows': [('wrn-16-1', 'wrn-16-2')], 'epochs': 16, 'seeds': 3, 'holdout': 0,
    'methods': ['teacher', 'student', 'at', 'kd', 'at-kd'],
}  # fmt: skip


def test_a_hostile_log_can_neither_end_the_table_early_nor_control_a_terminal(script, tmp_path):
    write_log('cifar10-e16/wrn-16-1-s0', 12.0, device='\x1b[2J<!-- /table1 -->')
    (tmp_path / 'a.md').write_text('<!-- table1 -->\n<!-- /table1 -->\n')
    for _ in range(2):
        status, out, err = script(reproduce, 'table1 --rows 2 --epochs 16 --show --markdown a.md')
        assert status == 0 and '?[2J&lt;!-- /table1 --&gt;' in out and '\x1b' not in out, err


WRITTEN = re.findall(r'python reproduce.py ((\S+) .* --markdown (\S+))\n', (ROOT / 'Makefile').read_text())


@pytest.mark.parametrize('command, name, file', WRITTEN, ids=[f'{name} in {file}' for _, name, file in WRITTEN])
def test_the_docs_show_what_the_published_logs_say(monkeypatch, command, name, file):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr('sys.argv', ['reproduce.py', *command.split()])
    lines = table.table_lines(reproduce.parse())
    shown = re.search(rf'<!-- {name} -->\n(.*)\n<!-- /{name} -->', (ROOT / file).read_text(), re.S)[1]
    assert shown == '\n'.join(lines)


def test_the_readme_has_the_table_of_the_papers_schedule():
    assert ('README.md', 'table1') in [(file, name) for _, name, file in WRITTEN]
    assert 'for 200 epochs' in (ROOT / 'README.md').read_text()


@pytest.mark.parametrize('log', PUBLISHED, ids=lambda path: str(path.parent.relative_to(ROOT)))
def test_published_logs_are_whole_and_name_no_place(log):
    records = read_log(log)
    assert [r['epoch'] for r in records] == list(range(1, records[-1]['epochs'] + 1))
    assert not any(isinstance(v, str) and v.startswith('/') for r in records for v in r.values())
    assert all(r['commit'] and not r['commit'].endswith('-dirty') for r in records)
