"""Learning rate and beta as functions of the epoch, so a resumed run needs no saved state for them."""

import math

BETA_DECAYS = {  # a factor for beta, as a function of the fraction of the run that is done
    'none': lambda part: 1,
    'linear': lambda part: 1 - part,
    'cosine': lambda part: (1 + math.cos(math.pi * part)) / 2,
}


def lr_at(epoch, lr, epoch_step, lr_decay_ratio):
    """The learning rate of a 1-based epoch: it drops at the start of each epoch in `epoch_step`."""
    return lr * lr_decay_ratio ** sum(step <= epoch for step in epoch_step)


def beta_at(epoch, epochs, beta, decay):
    """The weight of transfer in a 1-based epoch: beta in the first, falling to 0 after the last."""
    return beta * BETA_DECAYS[decay]((epoch - 1) / epochs)
