"""--help of the training scripts: each flag names the section of the paper that it belongs to."""

import re

import pytest

import cifar
import finetune
import imagenet

WITHOUT = {'options', 'run', 'evaluation'}  # groups of flags that are not in the paper


@pytest.mark.parametrize('module, section', [(cifar, '4.1'), (imagenet, '4.2.2'), (finetune, '4.2.1')])
def test_every_flag_names_the_section_of_the_paper_that_it_serves(script, module, section):
    """In its own help, or in the title of its group."""
    status, out, _ = script(module, '--help')
    groups = dict(re.findall(r'^(\w.*):\n((?:  .*\n)+)', out, re.M))
    assert status == 0 and WITHOUT < set(groups)
    recipe = [title for title in groups if title.endswith(f' (section {section})')]
    assert {title.partition(' (')[0] for title in recipe} >= {'data and teacher', 'network', 'training'}
    for title in set(groups) - WITHOUT - set(recipe):
        for flag in re.split(r'\n(?=  -)', groups[title]):
            assert re.search(r'\(?section\s[34]\.\d', flag), flag
