"""The loop over epochs that the three jobs share, and what goes on around an epoch's steps."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from signal import Signals

from torch import Tensor

from util.amp import BadSteps
from util.data.loaders import TrainLoader
from util.distributed import dist
from util.distributed.signals import Requests
from util.errors import Stopped, UserError, is_on_every_rank
from util.misc import Checkpoints, Position
from util.report.log import RunLog, describe_images
from util.report.meters import Meters
from util.rng import get_rng_state, set_rng_state
from util.updater import Updater
from util.words import count_nouns

Stats = dict[str, float]
Evaluate = Callable[[int, Callable[[], None]], Stats]  # takes the epoch, and a function that it calls once per batch


@dataclass(frozen=True)
class RunSettings:
    """How a run starts, goes on, saves, and stops.

    Attributes:
        epochs: Length of the whole run.
        accum_iter: Batches per update.
        save_freq: Epochs between checkpoints.
        save_minutes: Minutes between checkpoints within an epoch; 0: none.
        eval_freq: Epochs between evaluations.
        max_bad_steps: Skipped updates in a row that stop the run.
        max_bad_images: Share of unreadable images that is tolerated.
        best_by: Figure of the evaluation by which a checkpoint is the best.
        start_epoch: Epoch at which a run without a checkpoint, or from weights alone, starts.
        resume_override: Resume with another schedule than the checkpoint's.
        log_dir: Folder of the TensorBoard events; "": none.
    """

    epochs: int
    accum_iter: int
    save_freq: int
    save_minutes: float
    eval_freq: int
    max_bad_steps: int
    max_bad_images: float
    best_by: str = "acc1"
    start_epoch: int = 0
    resume_override: bool = False
    log_dir: str = ""


@dataclass(frozen=True)
class Mark:
    """State after an update, or at the start of an epoch, other than weights and optimiser.

    Attributes:
        images: Images of the epoch that are used already, over all ranks.
        rng: This rank's random streams.
        buffers: The model's buffers (a probe's BatchNorm statistics).
        sums: Snapshot of the epoch's meters.
    """

    images: int
    rng: dict
    buffers: list[Tensor]
    sums: tuple


class Run:
    """A run of a job: `start` resumes or begins it, `fit` loops over its epochs, and the engines report to it.

    An engine calls `start_meters` before its loop, `after_update` after every update, `end_of_training` after the loop.
    """

    def __init__(
        self,
        loader: TrainLoader,
        checkpoints: Checkpoints,
        log: RunLog | None,
        position: Position,
        settings: RunSettings,
    ) -> None:
        """Open a run at a position; `Run.start` finds the position and opens the log."""
        self.loader, self.checkpoints, self.log = loader, checkpoints, log
        self.position, self.settings = position, settings
        self.bad_steps = BadSteps(settings.max_bad_steps, loader.device, checkpoints.scaler.amp)
        self.known_bad = 0  # unreadable images reported so far, summed over the ranks
        self.meters: Meters | None = None  # of the epoch under way, while it is trained
        self.unsaved = False  # whether updates were made since the last checkpoint
        self.updater: Updater | None = None  # makes the updates, once training has begun
        self.updates = 0  # how many of them are made, and noted here
        # The last points of the epoch under way. The ranks learn one update late that one of them can't load images any
        # more (Requests.poll), so that the last two updates may be of its void batches: keep a third point.
        self.marks: deque[Mark] = deque(maxlen=3)
        self.requests: Requests | None = None  # signals and times at which to save, while `fit` runs
        self.speed: Stats = {}  # data_wait and tflops of the last epoch's training

    @classmethod
    def start(
        cls, checkpoints: Checkpoints, loader: TrainLoader, source: str, settings: RunSettings, lrs: list[float]
    ) -> "Run":
        """Resume from a checkpoint or start afresh; then prepare output_dir, open the logs, print what will be trained.

        Args:
            checkpoints: Checkpoints of the run; the state is loaded into their model, optimiser and scaler.
            loader: Training images.
            source: Checkpoint to resume from; "": none.
            settings: Settings of the run.
            lrs: Learning rate after warm-up, of each head of a sweep, for the summary.

        Raises:
            UserError: The checkpoint can't be read or does not fit.
        """
        images = len(loader.dataset)
        position = checkpoints.resume(source, settings.start_epoch, settings.resume_override, images)
        dist.run_on_rank0(lambda: checkpoints.prepare(source))
        done = position.images / loader.sampler.images_per_epoch
        log = RunLog(str(checkpoints.folder or ""), settings.log_dir, position.epoch, done)
        log.mirror_to_wandb(checkpoints.args)
        log.write_summary(checkpoints, loader, lrs)
        return cls(loader, checkpoints, log, position, settings)

    @property
    def first_step(self) -> int:
        """Return the number of batches of the epoch that are done already.

        Runs are saved only after updates. So if the position is no multiple of accum_iter, it is the end of an epoch
        whose last group was smaller: every batch counts as done, even if the present number of ranks would allow more.
        """
        done = self.position.images // self.checkpoints.images_per_step
        return len(self.loader) if done % self.settings.accum_iter else done

    # Around the epochs.

    def fit(self, train: Callable[[int], Stats], evaluate: Evaluate | None = None) -> None:
        """Train to the last epoch: per epoch shuffle, train, evaluate, write a line to log.txt, save.

        log.txt gets train_*, test_*, epoch, n_parameters, data_wait (share of the training time, on rank 0) and tflops
        (of all ranks together).

        Args:
            train: Trains the epoch of this number; returns its means.
            evaluate: Called every eval_freq epochs and after the last, with the epoch and a function to call once per
                batch; returns what goes into the log. The checkpoint of the best settings.best_by is kept.

        Raises:
            Stopped: On a signal, after saving.
            FloatingPointError, UserError: As `report` does; UserError also if a checkpoint can't be written.
            Exception: Any other error, after saving the updates that were made before it; with several ranks they are
                saved only where every rank meets the error.
        """
        start, first_epoch = time.time(), self.position.epoch
        self._begin()
        with Requests(self.settings.save_minutes) as self.requests, self._saved_on_error():
            for epoch in range(first_epoch, self.settings.epochs):
                self.position.epoch = epoch
                self.loader.sampler.set_epoch(epoch, self.first_step)
                stats = {f"train_{name}": value for name, value in train(epoch).items()}
                improved = False
                if evaluate and (self._is_last(epoch) or (epoch + 1) % self.settings.eval_freq == 0):
                    tested, improved = self._evaluate(evaluate)
                    stats |= {f"test_{name}": value for name, value in tested.items()}
                self._end_epoch(stats, improved)
        self.log.close()
        self._print_end(self.settings.epochs - first_epoch, time.time() - start)

    def _begin(self) -> None:
        """Restore the random streams; if the run restarts from an older checkpoint, save at once.

        Otherwise --resume auto, if this run is killed, would take one of the later checkpoints that it abandons.
        """
        if len(self.position.rng) > dist.rank():
            set_rng_state(self.position.rng[dist.rank()])
        if self.checkpoints.goes_back:
            self.position.branch = self.checkpoints.next_branch()
            self.checkpoints.save(self.position, whole_epoch=False)

    def _print_end(self, epochs: int, seconds: float) -> None:
        """Print how long training took, on which images, and the best figure.

        Args:
            epochs: Epochs that were trained now; 0 or less: none were left.
            seconds: Time that they took.
        """
        images = describe_images(self.loader.dataset)
        if epochs > 0:
            dist.print_rank0(f"trained {count_nouns(epochs, 'epoch')} in {seconds:.0f} s, on {images}")
        else:
            dist.print_rank0(f"nothing left to train: all {self.settings.epochs} epochs are done, on {images}")
        if self.position.best_epoch >= 0:
            file = self.checkpoints.epoch_file(self.position.best_epoch)
            self._print_best("", f", in {file}" if file else "")

    def _is_last(self, epoch: int) -> bool:
        return epoch + 1 == self.settings.epochs

    @contextmanager
    def _saved_on_error(self) -> Iterator[None]:
        """Return a context that saves the updates made before an error, and then raises the error again.

        Three kinds of errors are not preceded by saving: a FloatingPointError, after which the run is to resume from an
        earlier checkpoint; with several ranks, an error that may concern one rank alone, since all ranks must take part
        in saving; and an error amid an update, such as a lack of memory or the death of a loader process, which Python
        reports between any two instructions: some weights may be updated, and others not.
        """
        try:
            yield
        except (Stopped, FloatingPointError):
            raise
        except Exception as error:
            if self.unsaved and (dist.world_size() == 1 or is_on_every_rank(error)):
                try:
                    self._save_last_update()
                except Exception as second:  # such as a full disk, which may be the first error, too
                    dist.print_rank0(f"warning: the updates before the error could not be saved: {second}")
            raise

    def _save_last_update(self) -> None:
        """Save the state after the last update, without the batches already accumulated for the next one."""
        if self.updater and self.updater.begun != self.updates:
            newest = self.checkpoints.newest or "none was written yet"
            dist.print_rank0(f"warning: an update was only half made, and is not saved; newest checkpoint: {newest}")
            return
        rng = None
        if self.meters is not None:
            mark = self.marks[-1]
            rng, self.position.images = mark.rng, mark.images
            self.meters.restore(mark.sums)
            self._store_totals()
            for buffer, after_update in zip(self.checkpoints.model.buffers(), mark.buffers, strict=True):
                buffer.copy_(after_update)
        self._save(whole_epoch=False, rng=rng)
        if self.checkpoints.folder:
            dist.print_rank0(f"saved {self.checkpoints.newest} before the error that follows")

    def _evaluate(self, evaluate: Evaluate) -> tuple[Stats, bool]:
        """Evaluate after an epoch's training, and note the best accuracy, or whichever figure counts.

        Returns:
            The figures, and whether that figure is the best so far.
        """
        position = self.position
        position.images = len(self.loader) * self.checkpoints.images_per_step
        # All ranks use rank 0's figures: their own may be rounded differently, and they must agree on the best epoch.
        stats = dist.all_gather(evaluate(position.epoch, self.poll))[0]
        best_by = self.settings.best_by
        improved = stats.get(best_by, -1) > position.best
        if improved:
            position.best, position.best_epoch = stats[best_by], position.epoch
        if best_by in stats:
            self._print_best(" so far")
        self.log.hold(position.epoch, {f"perf/test_{name}": value for name, value in stats.items()})
        return stats, improved

    def _print_best(self, when: str, where: str = "") -> None:
        kind = {"acc1": "accuracy", "balanced_acc": "balanced accuracy"}[self.settings.best_by]
        position = self.position
        dist.print_rank0(f"best {kind}{when}: {position.best:.2f} %, after epoch {position.best_epoch}{where}")

    def _end_epoch(self, stats: Stats, improved: bool) -> None:
        """Log the epoch; save a checkpoint if it is time for one."""
        position, log = self.position, self.log
        speed = {name: float(f"{value:.4g}") for name, value in self.speed.items()}
        log.write_epoch({**stats, "epoch": position.epoch, "n_parameters": log.n_parameters, **speed})
        position.stats = {name: float(value) for name, value in stats.items()}
        tested = {name: value for name, value in position.stats.items() if name.startswith("test_")}
        position.tested = tested or position.tested
        if self._is_last(position.epoch) or improved or (position.epoch + 1) % self.settings.save_freq == 0:
            self._save(whole_epoch=True)
        position.restart_epoch()

    # Within an epoch: called by the engines.

    def start_meters(self, loss_tag: str, updater: Updater) -> Meters:
        """Open the meters of an epoch, from its beginning or from where it was left.

        Args:
            loss_tag: TensorBoard's name for the loss.
            updater: Makes the epoch's updates.
        """

        def on_report(step: int, steps: int, means: Stats, not_finite: list[int], speed: Stats) -> None:
            # Whatever the engine puts into its meters goes to TensorBoard, the loss under its published name.
            figures = {loss_tag if name == "loss" else name: value for name, value in means.items()}
            timed = {f"speed/{name}": value for name, value in speed.items()}
            self.log.write_scalars(self.position.epoch + step / steps, figures | timed)
            self.report(step, not_finite)

        self.meters = Meters(
            self.loader.device,
            self.position.totals,
            first_step=self.first_step,
            images_per_step=self.checkpoints.images_per_step,
            flops_per_image=self.log.flops_per_image,
            epochs=self.settings.epochs,
            on_report=on_report,
        )
        self.updater, self.updates = updater, updater.begun
        self.marks.clear()
        self._mark()
        return self.meters

    def _mark(self) -> None:
        buffers = [buffer.clone() for buffer in self.checkpoints.model.buffers()]
        self.marks.append(Mark(self.position.images, get_rng_state(), buffers, self.meters.snapshot()))

    def after_update(self, step: int, skipped: Tensor) -> None:
        """Note whether the update that ends at batch `step` was skipped, and save if it is time to.

        Raises:
            Stopped: On a signal, after saving.
            UserError: A rank can't load any more images; on all ranks.
        """
        self.bad_steps.update(skipped, step)
        self.position.images, self.unsaved = (step + 1) * self.checkpoints.images_per_step, True
        self._mark()
        self.updates = self.updater.begun
        signum, due, failed = self.requests.poll(bool(self.loader.problem))
        if failed or signum or due:
            # A rank may have failed to load images since the ranks' last exchange: find out before saving, or the
            # checkpoint would hold updates of void batches.
            self._raise_loading_problem()
        if signum or due:
            self._store_totals()
            self._save_in_epoch(signum)

    def _store_totals(self) -> None:
        """Store the sums behind the epoch's averages so far in the position; all ranks must call."""
        self.position.totals = self.meters.totals_so_far()

    def _raise_loading_problem(self) -> None:
        """Raise a UserError on all ranks if one of them can't load any more images; all must call.

        What is saved before the run ends is the state before the first update that lacks such images.
        """
        found = dist.all_gather((self.loader.problem, self.loader.first_lost_batch))
        problems = [(text, batch) for text, batch in found if text]
        if problems:
            images = min(batch for _, batch in problems) * self.checkpoints.images_per_step
            while len(self.marks) > 1 and self.marks[-1].images > images:
                self.marks.pop()
            raise UserError(problems[0][0])

    def end_of_training(self) -> None:
        """Store the sums and the speed that the meters measured in an epoch, after its last batch.

        Raises:
            UserError: A rank can't load any more images; on all ranks.
        """
        self._raise_loading_problem()
        self.position.totals = self.meters.totals
        self.speed = self.meters.epoch_speed()
        self.meters = None

    def report(self, step: int, not_finite: list[int]) -> None:
        """Warn of updates skipped since the last report and, if there are new ones, of all unreadable images.

        All ranks must call.

        Args:
            step: Batch of the epoch.
            not_finite: Number of losses that were not finite since the last report, by rank.

        Raises:
            FloatingPointError: Too many updates in a row were skipped; on all ranks.
            UserError: Too many images can't be read; on all ranks.
        """
        epoch, (count, first, too_many) = self.position.epoch, self.bad_steps.read()
        if count or too_many:
            self._raise_loading_problem()  # a rank without images is why updates were skipped: report that instead
            ranks = [str(rank) for rank, values in enumerate(not_finite) if values]
            who = f"the loss was not finite on rank {', '.join(ranks)}" if ranks else "every rank's loss was finite"
            what = (
                f"{count_nouns(count, 'update')} up to step {step} of epoch {epoch}, from step {first} on, skipped, "
                f"since gradients were not finite ({who})"
            )
            if too_many:
                newest = self.checkpoints.newest or "none was written yet"
                raise FloatingPointError(
                    f"{what}; --max_bad_steps {self.bad_steps.limit} in a row is the limit. The parameters are as "
                    f"before them; newest checkpoint: {newest}. Lower --blr (of several leave out the largest, which "
                    "stops all), add --clip_grad or use --amp off, and resume with --resume auto"
                )
            dist.print_rank0(f"warning: {what}")
        self._check_images()

    def _check_images(self) -> None:
        images, device = self.loader.dataset, self.loader.device
        found = int(dist.sum_over_ranks([float(images.bad.sum())], device)[0])
        if found == self.known_bad:
            return
        # Loader processes may mark more images meanwhile: every rank decides on one snapshot, shared by all.
        marked = dist.max_over_ranks(images.bad.clone(), device)
        images.bad |= marked  # so that each is named once
        bad, total = int(marked.sum()), len(images)
        self.known_bad = bad * dist.world_size()
        dist.print_rank0(f"warning: {bad} of {total} images cannot be read and are replaced by others")
        limit = self.settings.max_bad_images
        if bad > limit * total and (bad > 1 or not limit):  # a single one is tolerated, unless none is
            raise UserError(
                f"{bad} of {total} images in {images.images.root} cannot be read (named above), more than "
                f"--max_bad_images {limit:g}: fix or remove them, or raise the limit"
            )

    # Saving.

    def poll(self) -> None:
        """Save and stop if a signal has arrived; called once per batch of an evaluation.

        Raises:
            Stopped: There was one.
        """
        signum, *_ = self.requests.poll()
        if signum:
            self._save_in_epoch(signum)

    def _save_in_epoch(self, signum: int = 0) -> None:
        """Save the position within the epoch to checkpoint-last.pth; then stop, if a signal (0: none) asked for it.

        Raises:
            Stopped: A signal asked for it.
        """
        self._save(whole_epoch=False)
        if signum:
            what = f"{Signals(signum).name} in epoch {self.position.epoch} after {self.position.images} images"
            kept = "saved nothing, since there is no --output_dir"
            if self.checkpoints.folder:
                kept = f"saved {self.checkpoints.newest}. --resume auto resumes from there"
            raise Stopped(signum, f"stopped by {what}; {kept}")

    def _save(self, whole_epoch: bool, rng: dict | None = None) -> None:
        self.unsaved = False  # even if it fails: it would fail again
        self.checkpoints.save(self.position, whole_epoch, rng)
        self.requests.save_done()
        self.log.flush_held()
