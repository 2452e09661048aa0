"""The loops that the three jobs share: over the batches of an epoch, and over epochs."""

import time
from collections.abc import Callable, Sized
from signal import Signals

import torch
from torch import Tensor, nn

from util.amp import BadSteps, LossScaler, micro_step
from util.data.loaders import Feed
from util.distributed import dist
from util.distributed.signals import Requests
from util.errors import Stopped, UserError
from util.lr_sched import CosineSchedule
from util.misc import Checkpoints, Position, set_rng_state
from util.report.log import RunLog
from util.report.meters import Meters


class Run:
    """What goes on around the steps of a run: reports, bad updates and files, requests to save or to stop."""

    def __init__(
        self,
        loader: Feed,
        checkpoints: Checkpoints,
        log: RunLog,
        position: Position,
        device: torch.device,
        requests: Requests,
        max_bad_steps: int,
        max_bad_images: float,
        epochs: int = 0,
    ) -> None:
        """max_bad_steps: updates in a row with gradients that are not finite; max_bad_images: share of the files;
        epochs: of the whole run, for the time left."""
        self.checkpoints, self.log, self.position, self.requests = checkpoints, log, position, requests
        self.bad_steps = BadSteps(max_bad_steps, device, checkpoints.scaler.amp)
        self.images, self.max_bad_images, self.device = loader.dataset, max_bad_images, device
        self.steps = len(loader)
        self.known_bad, self.epochs = 0, epochs
        self.data_wait = 0.0  # share of the last epoch's time that was spent waiting for data

    @property
    def first_step(self) -> int:
        """Batches of the epoch that are done already. An update ends in the midst of a group of batches only at an
        epoch's end: then all are, though on another number of ranks one or two more would fit in."""
        done = self.position.images // self.checkpoints.images_per_step
        return self.steps if done % self.checkpoints.args["accum_iter"] else done

    def report(self, step: int, not_finite: list[int]) -> None:
        """At a logging step: say which updates were skipped; raise FloatingPointError, on all ranks, where they were
        too many in a row, and UserError where too many images can't be read."""
        epoch, (count, first, tripped) = self.position.epoch, self.bad_steps.read()
        if count or tripped:
            ranks = [str(rank) for rank, values in enumerate(not_finite) if values]
            who = f"the loss was not finite on rank {', '.join(ranks)}" if ranks else "every rank's loss was finite"
            what = f"{count} updates up to step {step} of epoch {epoch}, from step {first} on, had gradients that "
            what += f"were not finite ({who}) and were skipped"
            if tripped:
                newest = self.checkpoints.newest or "none was written yet"
                raise FloatingPointError(
                    f"{what}; --max_bad_steps {self.bad_steps.limit} in a row is the limit. The parameters are as "
                    f"before them; newest checkpoint: {newest}. Lower --blr, add --clip_grad or use --amp off, and "
                    "go on with --resume auto"
                )
            dist.say(f"warning: {what}")
        self._check_images()

    def _check_images(self) -> None:
        found = int(dist.sum_over_ranks([float(self.images.bad.sum())], self.device)[0])
        if found == self.known_bad:
            return
        # The loader's processes go on marking: what is decided here is decided by the same marks on every rank.
        marked = dist.max_over_ranks(self.images.bad.clone(), self.device)
        self.images.bad |= marked  # so that each is named once
        bad, total = int(marked.sum()), len(self.images)
        self.known_bad = bad * dist.world_size()
        dist.say(f"warning: {bad} of {total} images cannot be read and are replaced by others")
        if bad > self.max_bad_images * total:
            raise UserError(
                f"{bad} of {total} images in {self.images.images.root} cannot be read (named above), more than "
                f"--max_bad_images {self.max_bad_images:g}: mend or remove them, or raise the limit"
            )

    def after_update(self, step: int, meters: Meters) -> None:
        """After the update that ends at batch `step`: save where it is time to. Raises Stopped on a request to stop."""
        signum, due = self.requests.poll()
        if signum or due:
            self.position.images = (step + 1) * self.checkpoints.images_per_step
            self.position.totals = meters.totals_so_far()
            self.save_in_epoch(signum)

    def poll(self) -> None:
        """Between an epoch's training and its end, while evaluating: raises Stopped on a request, after saving."""
        signum, _ = self.requests.poll()
        if signum:
            self.save_in_epoch(signum)

    def save_in_epoch(self, signum: int = 0) -> None:
        """Save where the epoch stands; raises Stopped if a signal asked for it."""
        self.checkpoints.save(self.position, whole_epoch=False)
        self.saved()
        if signum:
            what = f"{Signals(signum).name} in epoch {self.position.epoch} after {self.position.images} images"
            kept = "saved nothing, since there is no --output_dir"
            if self.checkpoints.folder:
                kept = f"saved {self.checkpoints.newest}. --resume auto goes on from there"
            raise Stopped(signum, f"stopped by {what}; {kept}")

    def saved(self) -> None:
        """A checkpoint was written."""
        self.requests.save_done()
        self.log.flush_held()


def train_epoch(
    model: nn.Module,
    loader: Sized,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    epoch: int,
    scaler: LossScaler,
    schedule: CosineSchedule,
    loss_of: Callable[..., Tensor],
    *,
    accum_iter: int,
    clip_grad: float | None,
    run: Run | None,
    loss_tag: str,
    print_freq: int,
    on_update: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Train on every batch of the loader that is left; loss_of(*batch) is its mean loss, a scalar on the device.

    The loss of a batch is divided by the number of batches in its accumulation group; the learning rate is set at the
    start of a group. An update whose gradients are not finite changes nothing. TensorBoard gets the loss as `loss_tag`,
    and lr. on_update is called after every update. Returns the epoch's mean loss and learning rate over all ranks. With
    a run it raises what the run's methods raise, on every rank.
    """
    model.train()
    dist.zero_grad(optimizer)
    steps, first_step = len(loader), run.first_step if run else 0
    meters = Meters(device, run.position.totals if run else None)
    buffers = list(model.buffers())  # a probe's BatchNorm statistics

    def report(step: int, means: dict[str, float], not_finite: list[int], speed: dict[str, float]) -> None:
        if run:
            timed = {f"speed/{name}": value for name, value in speed.items()}
            run.log.scalars(epoch + step / steps, {loss_tag: means["loss"], "lr": means["lr"], **timed})
            run.report(step, not_finite)

    for step, batch in meters.watch(
        loader,
        first_step,
        epoch,
        print_freq,
        run.checkpoints.images_per_step if run else 0,
        run.epochs if run else 0,
        report,
    ):
        part = micro_step(step, steps, accum_iter)
        if part.first:
            lr = schedule.apply(optimizer, epoch + step / steps)
            before = [buffer.clone() for buffer in buffers]
        with dist.grad_sync(model, part.last):
            with scaler.autocast():
                loss = loss_of(*batch)
            scaler.backward(loss / part.size)
        meters.update(loss=loss, lr=lr)
        if part.last:
            skipped = scaler.step(optimizer, model.parameters(), clip_grad)
            for buffer, old in zip(buffers, before, strict=True):
                buffer.copy_(torch.where(skipped, old, buffer))
            if on_update:
                on_update()
            if run:
                run.bad_steps.update(skipped, step)
                run.after_update(step, meters)
    if run:
        run.position.totals = meters.totals
        run.data_wait = meters.waited / max(meters.elapsed, 1e-9)
    return meters.averages()


def run_epochs(
    loader: Feed,
    epochs: int,
    checkpoints: Checkpoints,
    log: RunLog,
    position: Position,
    device: torch.device,
    train: Callable[[int, Run], dict[str, float]],
    *,
    save_freq: int,
    save_minutes: float,
    max_bad_steps: int,
    max_bad_images: float,
    evaluate: Callable[[Callable[[], None]], dict[str, float]] | None = None,
    eval_freq: int = 1,
) -> None:
    """From `position` to the end, per epoch: shuffle, train, evaluate (every eval_freq epochs and after the last), log
    a line, and save a checkpoint (every save_freq epochs, after the last, and where the accuracy is the best so far).

    log.txt gets train_*, test_*, epoch, n_parameters and data_wait (share of the training time, on rank 0). Raises
    Stopped on a signal, after saving.
    """
    start = time.time()
    if len(position.rng) > dist.rank():
        set_rng_state(position.rng[dist.rank()])
    if checkpoints.goes_back:
        checkpoints.save(position, whole_epoch=False)  # or --resume auto, were this run killed, would take a later one
    first_epoch = position.epoch
    with Requests(save_minutes) as requests:
        run = Run(loader, checkpoints, log, position, device, requests, max_bad_steps, max_bad_images, epochs)
        for epoch in range(first_epoch, epochs):
            position.epoch = epoch
            loader.sampler.set_epoch(epoch, run.first_step)
            stats = {f"train_{name}": value for name, value in train(epoch, run).items()}
            last, improved = epoch + 1 == epochs, False
            if evaluate and (last or (epoch + 1) % eval_freq == 0):
                position.images = len(loader) * checkpoints.images_per_step
                try:
                    test = dist.gather(evaluate(run.poll))[0]  # or roundings part the ranks: what follows must agree
                except (UserError, OSError) as error:
                    if isinstance(error, UserError) or dist.world_size() == 1:  # every rank's error
                        run.save_in_epoch()  # what was trained is not lost
                    raise
                improved = test.get("acc1", -1) > position.best
                if improved:
                    position.best, position.best_epoch = test["acc1"], epoch
                if "acc1" in test:
                    dist.say(f"best accuracy so far: {position.best:.2f} %, after epoch {position.best_epoch}")
                stats |= {f"test_{name}": value for name, value in test.items()}
                log.hold(epoch, {f"perf/test_{name}": value for name, value in test.items()})
            log.epoch({**stats, "epoch": epoch, "n_parameters": log.n_parameters, "data_wait": round(run.data_wait, 4)})
            position.stats = {name: float(value) for name, value in stats.items()}
            if last or improved or (epoch + 1) % save_freq == 0:
                checkpoints.save(position, whole_epoch=True)
                run.saved()
            position.images, position.totals = 0, {}
    log.close()
    dist.say(f"trained {max(0, epochs - first_epoch)} epochs in {time.time() - start:.0f} s")
