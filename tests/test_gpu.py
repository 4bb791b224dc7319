"""benchmarks/gpu.py: what it writes, and its refusal without a GPU; its parts run here on the CPU."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import refused

import cifar

sys.path.insert(0, os.path.join(os.path.dirname(cifar.__file__), 'benchmarks'))
import gpu  # noqa: E402
import step  # noqa: E402

LONG = pytest.mark.skipif(not os.environ.get('AT_LONG_TESTS'), reason='takes long')


@pytest.fixture
def pretended(monkeypatch):
    """A GPU that is not there: parts in processes of their own use the CPU."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda i: 'a GPU')


def test_without_a_gpu_it_says_so_in_one_line(script, tmp_path):
    assert refused(script(gpu, '--out table.md'), 'there is no GPU that this PyTorch can use')
    assert not list(tmp_path.iterdir())
    assert 'resume' in script(gpu, '--help')[1]


def test_the_table_has_a_line_for_each_result_and_for_each_failure(script, pretended, monkeypatch):
    def fails():
        yield 'a step', '1 ms | or more'
        raise ValueError('status 1: out of memory')

    monkeypatch.delenv('AUTHORS', raising=False)
    monkeypatch.setattr(gpu, 'PARTS', {'steps': fails, 'authors': gpu.authors, 'tests': None})
    status, out, err = script(gpu, '--skip tests --out table.md')
    lines = open('table.md', encoding='utf-8').read().splitlines()
    assert status == 1 and not err and out.splitlines()[-1] == 'table: table.md'
    assert lines[0].startswith(f'`python benchmarks/gpu.py` on a GPU; torch {torch.__version__}, CUDA ')
    assert lines[2:] == [
        '| what | result |',
        '|---|---|',
        '| a step | 1 ms / or more |',
        '| steps | failed: status 1: out of memory |',
        "| the authors' step | left out: AUTHORS names no clone of szagoruyko/attention-transfer |",
    ]
    assert refused(script(gpu, '--skip all'), '--skip')


@pytest.mark.parametrize('out', ['.', 'nowhere/table.md', '/proc/table.md'])
def test_a_table_that_cannot_be_written_is_told_before_anything_runs(script, pretended, monkeypatch, out):
    monkeypatch.setattr(gpu, 'PARTS', {'tests': lambda: pytest.fail('ran')})
    assert refused(script(gpu, '--out', out), out)


def test_a_case_that_fails_loses_no_other(monkeypatch):
    measured = {'ratio': 2, 'ratio_min': 1, 'ratio_max': 3, 'fast_ms': 5, 'plain_ms': 10}

    def run(words, **environment):
        cases = words[words.index('--only') + 1].split(',')
        if 'kd' in cases:
            raise RuntimeError('out of memory')
        return '' if 'at' in cases else json.dumps(dict.fromkeys(cases, measured))

    monkeypatch.setattr(gpu, 'run', run)
    assert list(gpu.compared('float32', 'the plain one', ['student', 'at', 'kd'], [], True)) == [
        ('step, student, float32', '5.00 ms; the plain one 10.00 ms: 2.00 times as fast (1.00 to 3.00)'),
        ('step, at, float32', 'failed: IndexError: list index out of range'),
        ('step, kd, float32', 'failed: RuntimeError: out of memory'),
    ]


def test_a_failure_is_told_by_its_error_and_shown_whole(script, pretended, monkeypatch, tmp_path):
    code = "raise RuntimeError('CUDA error: a\\nCompile with TORCH_USE_CUDA_DSA')"
    (tmp_path / 'fails.py').write_text(code)
    monkeypatch.setattr(gpu, 'PARTS', {'epoch': lambda: iter([('epoch', gpu.run([str(tmp_path / 'fails.py')]))])})
    status, out, err = script(gpu, '--out table.md')
    assert status == 1 and 'epoch: failed: status 1: RuntimeError: CUDA error: a\n' in out
    assert 'Traceback' in err and 'Compile with TORCH_USE_CUDA_DSA' in err
    assert gpu.reason('') == 'it printed nothing'


def test_what_a_program_printed_before_the_time_ran_out_is_shown(script, pretended, monkeypatch, tmp_path):
    (tmp_path / 'waits.py').write_text("import time; print('test_one FAILED', flush=True); time.sleep(600)")
    monkeypatch.setattr(gpu, 'LIMIT', 2)
    monkeypatch.setattr(gpu, 'PARTS', {'epoch': lambda: iter([('epoch', gpu.run([str(tmp_path / 'waits.py')]))])})
    status, out, err = script(gpu, '--out table.md')
    assert status == 1 and 'epoch: failed: it did not end within 2 seconds\n' in out
    assert err == 'test_one FAILED\n'


def test_a_part_that_fails_in_any_way_ends_neither_the_others_nor_the_table(script, pretended, monkeypatch):
    def fails():
        raise torch.OutOfMemoryError('CUDA out of\nmemory')
        yield

    def interrupted():
        assert 'epoch | failed: OutOfMemoryError: CUDA out of memory' in open('table.md', encoding='utf-8').read()
        yield 'resume', 'a row'
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, 'PARTS', {'epoch': fails, 'resume': interrupted})
    assert script(gpu, '--out table.md')[0] == 130
    text = open('table.md', encoding='utf-8').read()
    assert 'CUDA out of memory' in text and '| resume | a row |' in text


def test_every_test_that_fails_is_a_line(monkeypatch):
    out = (
        'RuntimeError: captured\n'
        'FAILED tests/test_a.py::test_one - no\n'
        'ERROR tests/test_b.py - none\n'
        '1 failed, 2 passed, 1 error in 3 s\n'
    )
    given = []

    def call(words, folder, environment):
        given.append((words, environment))
        return subprocess.CompletedProcess(words, 1, out, '')

    monkeypatch.setattr(gpu, 'call', call)
    assert list(gpu.tests()) == [
        ('tests', 'failed: FAILED tests/test_a.py::test_one - no'),
        ('tests', 'failed: ERROR tests/test_b.py - none'),
        ('tests that need a GPU', '1 failed, 2 passed, 1 error in 3 s'),
    ]
    assert 'gpu' in given[0][0] and given[0][1]['AT_GPU_TESTS'] == '1'
    assert given[0][1].get('PYTHONSAFEPATH') == gpu.ENVIRONMENT.get('PYTHONSAFEPATH')


@pytest.mark.parametrize(
    'status, out, err',
    [(5, '', 'no tests ran'), (0, '28 skipped in 1 s', ''), (0, '1 passed, 2 skipped in 1 s', '')],
)
def test_tests_that_did_not_run_have_not_passed(monkeypatch, status, out, err):
    monkeypatch.setattr(gpu, 'call', lambda *_: subprocess.CompletedProcess([], status, out, err))
    with pytest.raises(ValueError, match=f'status {status}: {out or err}'):
        list(gpu.tests())


def test_a_run_that_was_not_killed_or_not_resumed_proves_nothing(monkeypatch):
    monkeypatch.setattr(gpu, 'run', lambda words, folder: 'resumed from part')
    monkeypatch.setattr(gpu, 'TRAIN', ['-c'])  # no script: status 2
    with pytest.raises(ValueError, match='the run was not killed and resumed: status 2'):
        list(gpu.resume())


@LONG
def test_workers_and_resume_run_as_they_would_on_a_gpu(script, pretended, monkeypatch):
    small = '--image_size 8 --randomcrop_pad 1 --depth 10 --width 0.25'
    monkeypatch.setattr(gpu, 'TRAIN', [*gpu.TRAIN, *small.split()])
    words = [word for part in ('tests', 'steps', 'authors', 'epoch') for word in ('--skip', part)]
    status, out, err = script(gpu, words, '--out table.md')
    assert status == 0 and 'all 40 parameters equal bit for bit' in out and '--ngpu 1: ' in out, (out, err)


def test_the_authors_step_needs_their_code_and_a_case_that_it_has(script):
    assert refused(script(step, '--authors nowhere'), '--authors nowhere holds no cifar.py')
    os.mkdir('theirs')
    open('theirs/cifar.py', 'x').close()
    assert refused(script(step, '--only imagenet_64 --authors theirs'), '--authors: expected --only some of student,')
