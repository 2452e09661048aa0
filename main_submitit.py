r"""Submit a job to SLURM through submitit, or run it on this machine.

    python main_submitit.py pretrain --nodes 8 --ngpus 8 --job_dir JOB --partition P --timeout 4320 -- \
        --data_path DIR --batch_size 64 --model mae_vit_large_patch16 --norm_pix_loss --epochs 800

The flags after --, which may be left out, go to main_pretrain.py (finetune: main_finetune.py, linprobe:
main_linprobe.py), which runs in one process per GPU. A job whose time is up, or that is preempted, saves, is queued
again by itself, and resumes with --resume auto. Submitting the same command again later resumes the job, too.

job_dir/
    submitit/        the batch script and every process's output, JOBID_RANK_log.out and .err
    ...              the job's own --output_dir, unless its flags name another
"""

import argparse
import importlib
import os
import signal
import sys
from pathlib import Path

import torch

import models_mae
import models_vit
from util import checks, errors
from util.command_line import Parser
from util.errors import UserError, raise_problems

try:
    import submitit
except ImportError:  # said in main, so that --help works without it
    submitit = None

MODELS = {"pretrain": models_mae.MODELS, "finetune": models_vit.MODELS, "linprobe": models_vit.MODELS}
SAVING_S = 120  # seconds before the end of its time at which a job is told to save
SHORTEST_MINUTES = 5  # a shorter job would be told to save, and be queued again, before it has trained


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the launcher's own flags, from argv or the command line; those of the job become `flags`.

    The job's flags are all that come after --, and those before it that are not the launcher's.
    """
    argv = sys.argv[1:] if argv is None else argv
    launcher_flags, flags = argv, []
    if "--" in argv:
        separator = argv.index("--")
        launcher_flags, flags = argv[:separator], argv[separator + 1 :]

    parser = Parser(__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("job", choices=list(MODELS), help="script to run: main_JOB.py")
    add("--job_dir", required=True, metavar="DIR", help="folder for the logs and the job's output; seen by all nodes")
    add("--nodes", default=1, type=int, metavar="N", help="number of nodes")
    add("--ngpus", default=8, type=int, metavar="N", help="GPUs per node, a process each; 0: one process on the CPU")
    add("--tasks", type=int, metavar="N", help="processes per node; default: one per GPU")
    add("--cpus", default=10, type=int, metavar="N", help="CPU cores per process")
    add("--timeout", default=4320, type=int, metavar="MINUTES", help="time after which the job is queued again")
    add("--partition", metavar="NAME", help="SLURM partition; default: the cluster's")
    slurm_help = "more options for sbatch, for example account=A qos=Q mem=100G"
    add("--slurm", nargs="+", default=[], metavar="KEY=VALUE", help=slurm_help)
    executor_help = "where to run; local: processes on this machine, waited for; debug: in this process"
    add("--executor", default="slurm", choices=("slurm", "local", "debug"), help=executor_help)
    add("--use_volta32", action="store_true", help="the same as --slurm constraint=volta32gb")
    add("--comment", default="", help="comment on the job, for SLURM")
    args, others = parser.parse_known_args(launcher_flags)
    args.flags = others + flags
    return args


class Job:
    """A job's script with its flags, as a function to call.

    submitit pickles it, and each of the job's processes calls it, at the first start and whenever it was queued again.
    """

    def __init__(self, job: str, flags: list[str]) -> None:
        self.job, self.flags = job, flags

    def __call__(self) -> None:
        """Run the script, and queue the job again if SLURM stopped it: its time is nearly up, or it is preempted."""
        from util import errors  # imported where the job runs

        main = importlib.import_module(f"main_{self.job}").main

        def save_and_requeue() -> None:
            """Run the job, which saves when it is stopped; queue it again if SLURM's time was the reason."""
            try:
                main(self.flags)
            except errors.Stopped as stop:
                # The state is saved; the signal's original handler, submitit's, now queues the job again.
                if stop.signum == signal.SIGUSR2:
                    print(stop, flush=True)
                    signal.raise_signal(stop.signum)
                raise

        errors.run(save_and_requeue)

    def checkpoint(self) -> "submitit.helpers.DelayedSubmission":
        """Return the job that submitit queues again: the same script and flags, which then resume the run."""
        return submitit.helpers.DelayedSubmission(self)


def job_flags(args: argparse.Namespace) -> list[str]:
    """Check the job's flags before it is submitted, and return them with --output_dir and, to train, --resume auto.

    Raises:
        UserError: A flag is wrong, or would keep the job from resuming when it is queued again.
    """
    # A user's own --output_dir comes later on the command line, and so takes precedence.
    flags = ["--output_dir", str(Path(args.job_dir).absolute()), *args.flags]
    script = importlib.import_module(f"main_{args.job}")
    parsed = script.get_args(flags)
    evaluation = getattr(parsed, "eval", False)
    if parsed.resume not in ("", "auto") and not evaluation:
        start_flag = "--init" if args.job == "pretrain" else "--finetune"
        raise UserError(
            f"--resume {parsed.resume}: a submitted job resumes from its own folder only (--resume auto); omit the "
            f"flag, or start from a checkpoint's encoder with {start_flag}"
        )
    problems = checks.flag_problems(parsed, MODELS[args.job])
    if parsed.overwrite:
        problems.append(
            "--overwrite would remove the checkpoints from which a job that is queued again resumes: omit it, and "
            "choose another --job_dir for a new run"
        )
    if not parsed.output_dir and not evaluation:
        problems.append("--output_dir '': a job that is queued again resumes from its checkpoints there; name a folder")
    raise_problems(problems)
    return flags if evaluation else flags + ["--resume", "auto"]


def executor(args: argparse.Namespace) -> "submitit.AutoExecutor":
    """Create submitit's executor with the launcher's flags.

    Raises:
        UserError: The flags are wrong, or there is no SLURM on this machine.
    """
    raise_problems(_launcher_problems(args))
    log_dir = Path(args.job_dir) / "submitit"
    try:
        result = submitit.AutoExecutor(log_dir, cluster=args.executor, slurm_max_num_timeout=999)
    except RuntimeError as error:  # no sbatch
        raise UserError(f"--executor {args.executor}: {error}. On a machine without SLURM: --executor local") from error
    result.update_parameters(
        name=f"mae_{args.job}",
        nodes=args.nodes,
        gpus_per_node=args.ngpus or None,
        cpus_per_task=args.cpus,
        tasks_per_node=args.tasks or args.ngpus or 1,
        timeout_min=args.timeout,
        slurm_partition=args.partition,
        slurm_signal_delay_s=SAVING_S,
        slurm_srun_args=[f"--cpus-per-task={args.cpus}"],  # srun of Slurm 22.05 to 23.02 takes none from sbatch
        slurm_additional_parameters={
            "requeue": True,
            **({"constraint": "volta32gb"} if args.use_volta32 else {}),
            **({"comment": args.comment} if args.comment else {}),
            **_sbatch_options(args.slurm),
        },
    )
    return result


def _sbatch_options(pairs: list[str]) -> dict[str, str]:
    """Return sbatch's options by their names, which submitit writes with _ for -."""
    options = (pair.partition("=") for pair in pairs)
    return {name.replace("-", "_"): value for name, _, value in options}


def _launcher_problems(args: argparse.Namespace) -> list[str]:
    """Return the problems of the launcher's own flags, as messages."""
    problems = [
        f"--{name} {getattr(args, name)} must be at least 1"
        for name in ("nodes", "cpus", "timeout")
        if getattr(args, name) < 1
    ]
    problems += [f"--slurm {pair}: needs KEY=VALUE" for pair in args.slurm if pair.find("=") < 1]
    if "cpus_per_task" in _sbatch_options(args.slurm):
        problems.append("--slurm cpus-per-task: use --cpus, which srun is told, too")
    if args.executor == "slurm" and 1 <= args.timeout < SHORTEST_MINUTES:
        problems.append(
            f"--timeout {args.timeout} must be at least {SHORTEST_MINUTES}: {SAVING_S // 60} minutes before its end "
            "the job saves and is queued again"
        )
    if args.ngpus < 0:
        problems.append(f"--ngpus {args.ngpus} must be at least 0")
    if args.tasks is not None and args.tasks < 1:
        problems.append(f"--tasks {args.tasks} must be at least 1")

    return problems + (_local_problems(args) if args.executor == "local" else [])


def _local_problems(args: argparse.Namespace) -> list[str]:
    """Return the problems of flags that ask for nodes or GPUs which this machine does not have, as messages."""
    problems = []
    if args.nodes > 1:
        problems.append(f"--nodes {args.nodes}: --executor local has one; use --nodes 1")

    # submitit's local executor gives the processes the first GPUs, whichever are visible.
    visible, first = os.environ.get("CUDA_VISIBLE_DEVICES"), ",".join(map(str, range(args.ngpus)))
    gpus = torch.cuda.device_count()
    if args.ngpus > 0 and visible not in (None, first):
        problems.append(f"CUDA_VISIBLE_DEVICES={visible}: --executor local takes GPUs {first}; use torchrun for others")
    elif args.ngpus > gpus:
        problems.append(f"--ngpus {args.ngpus}: this machine has {gpus}; pass --ngpus {gpus or '0, for the CPU'}")
    return problems


def main(argv: list[str] | None = None) -> None:
    """Check the flags, submit the job, and print where its output is (argv defaults to the command line's).

    With --executor local, wait for the job, and exit with code 1 if it failed; with debug, run it in this process.
    """
    args = get_args(argv)
    if submitit is None:
        raise UserError("main_submitit.py needs submitit: pip install submitit")
    flags = job_flags(args)
    submitter = executor(args)

    # The job's processes import the scripts, wherever they are started from.
    folder = str(Path(__file__).resolve().parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
    try:
        job = submitter.submit(Job(args.job, flags))
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"SLURM refuses the job: {str(error).strip()}") from error

    # SLURM's job goes on by itself; others are waited for.
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
