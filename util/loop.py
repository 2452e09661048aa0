"""The loop over epochs that the three jobs share."""

import time
from collections.abc import Callable

from torch.utils.data import DataLoader

from util import dist
from util.log import RunLog


def run_epochs(
    loader: DataLoader,
    epochs: range,
    save_freq: int,
    log: RunLog,
    train: Callable[[int], dict[str, float]],
    save: Callable[[int], None],
    evaluate: Callable[[], dict[str, float]] | None = None,
    eval_freq: int = 1,
) -> None:
    """Per epoch: shuffle, train, save a checkpoint (every save_freq epochs and after the last), evaluate (likewise),
    and log.

    log.txt gets train_*, test_*, epoch and n_parameters; the best accuracy so far is printed.
    """
    start, best = time.time(), 0.0
    for epoch in epochs:
        loader.sampler.set_epoch(epoch)
        stats = {f"train_{name}": value for name, value in train(epoch).items()}
        last = epoch + 1 == epochs.stop
        if last or (epoch + 1) % save_freq == 0:
            save(epoch)
        if evaluate and (last or (epoch + 1) % eval_freq == 0):
            test = evaluate()
            best = max(best, test["acc1"])
            dist.say(f"best accuracy so far: {best:.2f} %")
            stats |= {f"test_{name}": value for name, value in test.items()}
            log.scalars(epoch, {f"perf/test_{name}": value for name, value in test.items()})
        log.epoch({**stats, "epoch": epoch, "n_parameters": log.n_parameters})
    log.close()
    dist.say(f"trained {len(epochs)} epochs in {time.time() - start:.0f} s")
