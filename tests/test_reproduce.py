"""The table is made of logs alone, and the README shows what the published logs say."""

import json
import pathlib
import re

import pytest
from conftest import refused

import engine
import reproduce

ROOT = pathlib.Path(reproduce.__file__).parent
RECORD = {
    'dataset': 'CIFAR10', 'train_images': 50_000, 'test_images': 9_980, 'holdout': 0, 'epochs': 16, 'dtype': 'bfloat16',
    'lr_decay_ratio': 0.2, 'epoch_step': '[5,10,13]', 'batch_size': 128, 'device': 'a machine', 'torch': '2',
}  # fmt: skip


def write_log(name, error, epochs=16, last=16):
    folder = pathlib.Path('logs') / name
    folder.mkdir(parents=True)
    records = [
        {**RECORD, 'epochs': epochs, 'epoch': e, 'test_acc': 100 - error - (last - e)} for e in range(1, last + 1)
    ]
    (folder / 'log.txt').write_text(''.join(f'json_stats: {json.dumps(r)}\n' for r in records))


def test_dry_run_prints_the_commands_teachers_first_and_each_once(script):
    status, out, _ = script(reproduce, 'table1 --dry_run --seeds 2 --dataroot there')
    lines = out.splitlines()
    assert status == 0 and len(lines) == len(set(lines)) == 2 * (3 + 1 + 3 * 3)  # WRN-16-2 both teaches and learns
    assert all(line.startswith('python cifar.py --dataset CIFAR10 --dataroot there --epochs 200') for line in lines)
    assert all('[60,120,160]' in line for line in lines)
    saved = [re.search(r'--save logs/(\S+)', line)[1] for line in lines]
    for i, line in enumerate(lines):
        teacher = re.search(r'--teacher_id (\S+)', line)
        assert teacher is None or teacher[1] in saved[:i]
    assert sum('--beta 1e+3' in line for line in lines) == sum('--alpha 0.9' in line for line in lines) == 12
    assert sum('--beta_decay linear' in line for line in lines) == 6
    assert all(line.endswith('-s0') for line in re.findall(r'--teacher_id \S+', out))


def test_the_teacher_of_one_seed_is_enough_to_teach(script):
    _, out, _ = script(reproduce, 'table1 --rows 1 --methods at --seeds 3 --dry_run')
    assert out.count('cifar.py') == 1 + 3


def test_the_schedule_scales_with_the_epochs(script):
    _, out, _ = script(reproduce, 'table1 --rows 1 --methods student --epochs 16 --seeds 1 --dtype bfloat16 --dry_run')
    assert out.splitlines() == [
        'python cifar.py --dataset CIFAR10 --dataroot . --epochs 16 --epoch_step [5,10,13] --dtype bfloat16 '
        '--depth 16 --width 1 --seed 0 --save logs/cifar10-e16-wrn-16-1-s0 --resume auto'.replace(
            '[5,10,13]', "'[5,10,13]'"
        )
    ]


def test_the_table_shows_median_spread_and_difference_and_leaves_blank_what_was_not_run(script):
    for seed, error in enumerate((13.0, 12.0, 12.5)):
        write_log(f'cifar10-e16-wrn-16-1-s{seed}', error)
    write_log('cifar10-e16-wrn-16-1-at-wrn-16-2-s0', 11.0)
    write_log('cifar10-e16-wrn-16-1-kd-wrn-16-2-s0', 10.0, last=15)  # not finished
    status, out, _ = script(reproduce, 'table1 --rows 1 --epochs 16 --show')
    rows = {line.split(' | ')[1]: line for line in out.splitlines() if line.startswith('| WRN')}
    assert status == 0
    assert (
        rows['student alone'] == '| WRN-16-1 <- WRN-16-2 | student alone | 12.50 | 12.00 to 13.00 | 3 | 8.77 | +3.73 |'
    )
    assert rows['AT'] == '| WRN-16-1 <- WRN-16-2 | AT | 11.00 |  | 1 | 7.93 | +3.07 |'
    assert rows['KD'] == '| WRN-16-1 <- WRN-16-2 | KD |  |  |  | 7.41 |  |'
    assert 'bfloat16, last epoch, tested on 9,980 of 10,000 images' in out


def test_the_table_is_written_between_its_markers_alone(script, tmp_path):
    write_log('cifar10-e16-wrn-16-1-s0', 12.0)
    (tmp_path / 'a.md').write_text('before\n<!-- table1 -->\nold\n<!-- /table1 -->\nafter\n')
    assert script(reproduce, 'table1 --rows 1 --epochs 16 --show --markdown a.md')[0] == 0
    text = (tmp_path / 'a.md').read_text()
    assert text.startswith('before\n<!-- table1 -->\n| student') and text.endswith('\n<!-- /table1 -->\nafter\n')
    assert 'old' not in text and '| 12.00 |' in text
    (tmp_path / 'b.md').write_text('no markers')
    assert refused(script(reproduce, 'table1 --show --markdown b.md'), 'b.md has no lines <!-- table1 -->')
    assert refused(script(reproduce, 'table1 --show --markdown nowhere.md'), 'nowhere.md')


@pytest.mark.parametrize(
    'flags', ['table9', 'table1 --rows 4', 'table1 --rows x', 'table1 --methods at,foo', 'demo --epochs 0']
)
def test_wrong_flags_are_refused(script, flags):
    assert refused(script(reproduce, flags))


def test_a_failed_run_is_reported_and_the_others_go_on(script):
    status, out, _ = script(
        reproduce, 'demo --methods teacher,student --dtype float --epochs 1 --dataroot .', '--holdout 1000'
    )
    assert status == 1 and out.count('failed with exit status 2') == 2 and '| WRN-16-1 <- WRN-16-2 | teacher |' in out


def test_the_readme_shows_what_the_published_logs_say(script, monkeypatch):
    command = re.search(r'table: .*\n\t\S+ reproduce.py (.*) --markdown README.md', (ROOT / 'Makefile').read_text())[1]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr('sys.argv', ['reproduce.py', *command.split()])
    lines = reproduce.table_lines(reproduce.parse())
    shown = re.search(r'<!-- table1 -->\n(.*)\n<!-- /table1 -->', (ROOT / 'README.md').read_text(), re.S)[1]
    assert shown == '\n'.join(lines)


@pytest.mark.parametrize('log', sorted((ROOT / 'logs').glob('*/log.txt')), ids=lambda path: path.parent.name)
def test_published_logs_are_whole_and_name_no_place(log):
    records = engine.read_log(log)
    assert [r['epoch'] for r in records] == list(range(1, records[-1]['epochs'] + 1))
    assert not any(isinstance(v, str) and v.startswith('/') for r in records for v in r.values())
    assert all(r['commit'] and not r['commit'].endswith('-dirty') for r in records)
