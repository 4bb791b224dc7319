"""The log: what is written, and what is read of ours and of the authors'."""

import json

import pytest

from engine import log
from engine.log import commit, cut_log, line_of, read_log

UPSTREAM_LINE = (
    'json_stats: {"depth": 16, "width": 2.0, "lr": 0.1, "alpha": 0, "epoch_step": "[60,120,160]", "epoch": 1, '
    '"train_loss": 1.4, "train_acc": 48.3, "test_loss": 1.1, "test_acc": 60.5, "num_classes": 10, '
    '"n_parameters": 691674, "train_time": 12.5, "test_time": 1.1, "at_losses": [[NaN, NaN], [0.1, Infinity]]}'
)


def test_the_authors_logs_are_read_and_other_lines_passed_over(tmp_path):
    path = tmp_path / 'log.txt'
    path.write_text(f'parsed options: {{}}\n{UPSTREAM_LINE}\n\n{UPSTREAM_LINE.replace("60.5", "61.0")}\n')
    records = read_log(path)
    assert [r['test_acc'] for r in records] == [60.5, 61.0] and records[0]['width'] == 2


def test_a_last_line_cut_short_is_left_out_and_any_other_is_an_error(tmp_path):
    path = tmp_path / 'log.txt'
    for cut in range(10, len(UPSTREAM_LINE)):
        path.write_text(f'{UPSTREAM_LINE}\n{UPSTREAM_LINE[:cut]}')
        assert len(read_log(path)) == 1
    path.write_text(f'{UPSTREAM_LINE[:100]}\n{UPSTREAM_LINE}\n')
    with pytest.raises(ValueError, match='log.txt, line 1: json_stats is not followed by a JSON object'):
        read_log(path)
    path.write_text(f'json_stats: {"[" * 100_000}\n{UPSTREAM_LINE}\n')
    with pytest.raises(ValueError, match='line 1'):
        read_log(path)


def test_a_log_is_cut_to_its_first_epochs_and_keeps_other_lines(tmp_path):
    path, second = tmp_path / 'log.txt', UPSTREAM_LINE.replace('"epoch": 1,', '"epoch": 2,')
    for end in ('', second[:5], second[:100]):
        path.write_text(f'# a note\n{UPSTREAM_LINE}\n\n{second}\n# another\n{end}')
        cut_log(path, 1)
        assert path.read_text() == f'# a note\n{UPSTREAM_LINE}\n\n# another\n'


def test_log_lines_are_strict_json():
    line = line_of({'a': float('nan'), 'b': [(1.0, float('inf'))], 'c': 'd', 'e': True, 'f': None})
    assert json.loads(line.removeprefix('json_stats: ')) == {
        'a': None,
        'b': [[1.0, None]],
        'c': 'd',
        'e': True,
        'f': None,
    }


def test_commit_is_that_of_this_code_or_none(monkeypatch, tmp_path):
    assert commit() is None or len(commit().removesuffix('-dirty')) >= 7
    monkeypatch.setattr(log, '__file__', str(tmp_path / 'engine' / 'log.py'))
    assert commit() is None
