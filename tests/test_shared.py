"""Names and labels in memory that processes share: the same as lists of them, and no copy in a loader process."""

import os

import numpy as np
import pytest
import reading
import torch

from images import photographs, readers, shared

NAMES = ['a/b.jpg', '', 'Stra\u00dfe.png', os.fsdecode(b'caf\xe9.jpg'), 'x' * 300]


def test_names_are_read_as_from_a_list_whatever_their_bytes():
    for names in (NAMES, [], [''], NAMES[:1] * 1000):
        found = shared.Names(names)
        assert list(found) == names and len(found) == len(names)
        assert [found[i] for i in range(-len(names), len(names))] == names * 2
        for i in (len(names), -len(names) - 1):
            with pytest.raises(IndexError):
                found[i]
    assert shared.Names(NAMES)[np.int64(2)] == NAMES[2] and shared.Names(NAMES).index(NAMES[3]) == 3


def test_a_shared_data_set_holds_what_was_listed_in_memory_that_nobody_writes(folder):
    held = photographs.hold_out(folder, 6)
    for dataset in (folder, held, held._replace(train=held.train._replace(boxes=[(0.5, 1, 2, 3)] * 19, scaled=True))):
        one = photographs.share(dataset)
        for found in (one.value, shared.Shared.at(one.address()).value):
            assert found.classes == dataset.classes
            for part, expected in ((found.train, dataset.train), (found.test, dataset.test)):
                assert list(part.paths) == list(expected.paths) and part[2:] == expected[2:]
                assert part.labels.dtype == np.int64 and part.labels.tolist() == expected.labels.tolist()
                assert not part.labels.flags.writeable and not part.paths.text.flags.writeable


@pytest.mark.parametrize('nthread', [0, 2])
def test_shared_names_give_the_very_pixels_and_labels_of_lists(folder, nthread):
    """Over three epochs and their tests, in the same processes, equal to those read by names and labels as listed."""
    one, device = photographs.share(folder), torch.device('cpu')
    for epoch in range(3):
        train = photographs.TrainBatches(one, 7, 16, 5, 0, 1, nthread, device, epoch)
        test = photographs.TestBatches(one, 4, 16, 0, 1, nthread, device)
        for files, batches, augment in ((folder.train, train, (5, epoch)), (folder.test, test, None)):
            for indices, (images, labels, size) in zip(batches.read[2], batches, strict=True):
                pixels, expected, _ = photographs.read_batch(files, 16, augment, indices)
                assert torch.equal(images, photographs.normalize(pixels)) and labels.tolist() == expected
                assert size == len(indices)


@pytest.mark.skipif(not os.path.exists('/proc/self/smaps'), reason='reads memory from /proc')
def test_loader_processes_have_no_copy_of_many_names():
    """As lists, these would take 50 MB in each process."""
    files = photographs.Files([f'train/n{i:08d}/n{i:08d}_{i}.JPEG' for i in range(400_000)], torch.arange(400_000))
    one = photographs.share(photographs.Dataset(files, files, []))
    for number, (_, last, megabytes) in enumerate(readers.read_ahead(reading.memory, one, [0] * 4, (1, 1, 1, 3), 2)):
        assert last == (files.paths[-1], 399_999) and megabytes < 20, (number, megabytes)
