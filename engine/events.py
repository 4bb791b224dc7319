"""TensorBoard's event files beside a log (--tensorboard)."""

import contextlib
import functools
import importlib.util
import os

from engine.series import flat
from engine.workers import rank


def check(opt):
    """Raise ValueError for --tensorboard without a folder or without its package."""
    if opt.tensorboard and not opt.save:
        raise ValueError('--tensorboard writes beside the log in --save, which is not given')
    if opt.tensorboard and not opt.save.isprintable():
        raise ValueError(f'--tensorboard cannot write into --save {opt.save}: its name is not printable')
    if opt.tensorboard and importlib.util.find_spec('tensorboard') is None:
        raise ValueError('--tensorboard needs the package tensorboard: pip install tensorboard')


@contextlib.contextmanager
def writer(opt, done):
    """A function that writes the numbers of an epoch's results into opt.save, or does nothing without --tensorboard.

    done: the number of complete epochs; TensorBoard hides what an earlier process wrote of later ones.
    """
    if not opt.tensorboard or rank():
        yield lambda results: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter  # takes seconds, so only where it is asked for
    except ImportError as error:
        raise ValueError(f'--tensorboard: the package tensorboard cannot be imported ({error})') from None
    with contextlib.ExitStack() as stack:

        @functools.cache  # at the first epoch's end, so that a run that fails before leaves no file
        def opened():
            folder = os.path.abspath(opt.save)  # SummaryWriter would write elsewhere for a URL
            return stack.enter_context(SummaryWriter(folder, purge_step=done + 1))

        def write(results):
            events = opened()
            for name, value in flat(results).items():
                if type(value) in (int, float) and name != 'epoch':
                    events.add_scalar(name, value, results['epoch'])
            events.flush()

        yield write
