"""Submit a job to SLURM, or run it on this machine, through submitit; SLURM puts it back into the queue by itself.

    python main_submitit.py pretrain --nodes 8 --ngpus 8 --job_dir JOB --partition P --timeout 4320 -- \
        --data_path DIR --batch_size 64 --model mae_vit_large_patch16 --norm_pix_loss --epochs 800

What follows -- goes to main_pretrain.py (finetune: main_finetune.py, linprobe: main_linprobe.py), one process per GPU.
A job whose time is up, or that is preempted, saves and is queued again; it goes on with --resume auto. Submitting the
same command again later goes on, too.

job_dir/
    submitit/        the batch script and every process's output, JOBID_RANK_log.out and .err
    ...              the job's own --output_dir, unless FLAGS name another
"""

import argparse
import importlib
import os
import signal
import sys
from pathlib import Path

import submitit

import models_mae
import models_vit
from util import errors, options
from util.errors import UserError

MODELS = {"pretrain": models_mae.MODELS, "finetune": models_vit.MODELS, "linprobe": models_vit.MODELS}
SAVING_S = 120  # how long before its time is up a job is told to save


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The launcher's own flags, and in `flags` those of the job."""
    words = sys.argv[1:] if argv is None else argv
    own, flags = (words[: words.index("--")], words[words.index("--") + 1 :]) if "--" in words else (words, [])
    parser = argparse.ArgumentParser(
        description="Submit a job through submitit: main_submitit.py JOB ... -- FLAGS OF THE JOB",
        formatter_class=options.HelpFormatter,
    )
    add = parser.add_argument
    add("job", choices=list(MODELS))
    add("--job_dir", required=True, metavar="DIR", help="logs, and output_dir of the job; seen by all nodes")
    add("--nodes", default=1, type=int)
    add("--ngpus", default=8, type=int, help="GPUs of each node, and processes; 0: one process on the CPU")
    add("--tasks", type=int, help="processes on each node, where not one per GPU")
    add("--cpus", default=10, type=int, help="cores per process")
    add("--timeout", default=4320, type=int, help="minutes until the job is queued again")
    add("--partition", help="SLURM's partition; default: its own")
    add("--slurm", nargs="+", default=[], metavar="KEY=VALUE", help="more for sbatch: account=A qos=Q mem=100G")
    add(
        "--executor",
        default="slurm",
        choices=("slurm", "local", "debug"),
        help="local: processes on this machine, waited for; debug: in this one",
    )
    args = parser.parse_args(own)
    args.flags = flags
    return args


class Job:
    """A script's run in one process of the job. submitit pickles it, and calls it after every start."""

    def __init__(self, job: str, flags: list[str]) -> None:
        self.job, self.flags = job, flags

    def __call__(self) -> None:
        from util import errors  # imported where the job runs

        main = importlib.import_module(f"main_{self.job}").main

        def save_and_requeue() -> None:
            try:
                main(self.flags)
            except errors.Stopped as stop:
                if stop.signum == signal.SIGUSR2:  # saved: now submitit's own handler is due, which queues the job
                    print(stop, flush=True)
                    signal.raise_signal(stop.signum)
                raise

        errors.run(save_and_requeue)

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """What submitit asks for when it queues the job again."""
        return submitit.helpers.DelayedSubmission(self)


def job_flags(args: argparse.Namespace) -> list[str]:
    """The job's flags, with its folder and --resume auto. Raises UserError, or argparse's exit, where they are wrong:
    now rather than when the job's turn comes."""
    flags = ["--output_dir", str(Path(args.job_dir).absolute()), *args.flags]  # the last one counts
    script = importlib.import_module(f"main_{args.job}")
    parsed = script.get_args(flags)
    evaluation, start = getattr(parsed, "eval", False), parsed.resume
    if start not in ("", "auto") and not evaluation:
        raise UserError(
            f"--resume {start}: a job goes on from its own folder (--resume auto), and begins with --finetune or anew"
        )
    problems = options.flag_problems(parsed, MODELS[args.job])
    if parsed.overwrite:
        problems.append("--overwrite: a job goes on from what its folder holds; choose another --job_dir")
    if not parsed.output_dir and not evaluation:
        problems.append("--output_dir '': a job that is queued again goes on from its checkpoints")
    if problems:
        raise UserError("; ".join(problems))
    return flags if evaluation else flags + ["--resume", "auto"]


def executor(args: argparse.Namespace) -> submitit.AutoExecutor:
    """submitit's executor with the launcher's flags. Raises UserError where they don't fit it."""
    problems = [
        f"--{name} {getattr(args, name)} must be at least 1"
        for name in ("nodes", "cpus", "timeout")
        if getattr(args, name) < 1
    ]
    problems += [f"--slurm {pair}: needs KEY=VALUE" for pair in args.slurm if "=" not in pair]
    if args.ngpus < 0 or (args.tasks is not None and args.tasks < 1):
        problems.append("--ngpus must not be negative, --tasks at least 1")
    if args.executor == "local" and args.nodes > 1:
        problems.append(f"--nodes {args.nodes}: --executor local has one")
    shown, first = os.environ.get("CUDA_VISIBLE_DEVICES"), ",".join(map(str, range(args.ngpus)))
    if args.executor == "local" and args.ngpus > 0 and shown not in (None, first):
        problems.append(f"CUDA_VISIBLE_DEVICES={shown}: --executor local takes GPUs {first}; use torchrun for others")
    if problems:
        raise UserError("; ".join(problems))
    try:
        found = submitit.AutoExecutor(Path(args.job_dir) / "submitit", cluster=args.executor, slurm_max_num_timeout=999)
    except RuntimeError as error:  # no sbatch
        raise UserError(f"--executor {args.executor}: {error}. On a machine without SLURM: --executor local") from error
    found.update_parameters(
        name=f"mae_{args.job}",
        nodes=args.nodes,
        gpus_per_node=args.ngpus or None,
        cpus_per_task=args.cpus,
        tasks_per_node=args.tasks or args.ngpus or 1,
        timeout_min=args.timeout,
        slurm_partition=args.partition,
        slurm_signal_delay_s=SAVING_S,
        slurm_additional_parameters={"requeue": True, **dict(pair.split("=", 1) for pair in args.slurm)},
    )
    return found


def main(argv: list[str] | None = None) -> None:
    """Check, submit, and say where to look (argv defaults to the command line's)."""
    args = get_args(argv)
    flags = job_flags(args)
    runner = executor(args)
    # The job's processes import the scripts, wherever they are started from.
    here = str(Path(__file__).resolve().parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
    try:
        job = runner.submit(Job(args.job, flags))
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"SLURM refuses the job: {str(error).strip()}") from error
    if args.executor == "debug":
        job.results()
        return
    print(f"job {job.job_id}: output in {job.paths.stdout}, errors in {job.paths.stderr}", flush=True)
    if args.executor == "slurm":
        print(f"squeue -j {job.job_id} shows it, scancel {job.job_id} stops it")
        return
    job.wait()
    if job.exception() is not None:
        print(f"error: the job failed; the end of {job.paths.stderr} says why", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    errors.run(main)
