"""What a network scores on a test set, each image counted once over all workers."""

import torch
import torch.nn.functional as F
from torchnet.engine import Engine
from torchnet.meter import AverageValueMeter, ClassErrorMeter

from engine.precision import autocast
from engine.workers import sum_over_workers
from layers import full


def evaluate(network, batches, device, dtype='float', topk=(1,), on_batch=lambda: None):
    """Cross entropy and accuracies in percent of a network (f, params) over batches, over all workers.

    Returns (loss, [accuracy for each k of topk]). on_batch() is called after each batch.
    """
    f, params = network
    losses, errors = AverageValueMeter(), ClassErrorMeter(list(topk), accuracy=True)

    def forward(sample):
        with autocast(device, dtype):
            logits = full(f(sample[0], params, False)[0])
        return F.cross_entropy(logits, sample[1], reduction='sum'), logits

    def on_forward(state):
        losses.add(state['loss'].item(), len(state['sample'][1]))
        errors.add(state['output'].float(), state['sample'][1])
        on_batch()

    engine = Engine()
    engine.hooks['on_forward'] = on_forward
    with torch.no_grad():
        engine.test(forward, batches)
    loss, n, *wrong = sum_over_workers([losses.sum, losses.n, *(errors.sum[k] for k in topk)], device)
    return loss / n, [100 * (1 - w / n) for w in wrong]
