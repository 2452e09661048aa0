"""Measure a training step of this repository with and without its speed-ups, and of Hugging Face's model, by turns.

    python benchmarks/step.py --model mae_vit_base_patch16 --batch_size 16 --json step.json
    python benchmarks/step.py --model vit_base_patch16 --job finetune --batch_size 16
    python benchmarks/step.py --model vit_base_patch16 --job linprobe --batch_size 16

A step is forward pass, backward pass and update (AdamW; LARS for the probe) on a batch of random images that is on the
device already. The rows:
    ours       the step of the scripts: fused optimiser, no waiting for the device; --amp, --attention, --compile and
               --grad_checkpoint are the scripts' flags, with their defaults
    ours_eager the same, not compiled; only where `ours` is compiled
    off        the step of the reference: fp16 with a scaler on a GPU, fp32 on a CPU; plain attention, an optimiser that
               loops over the parameters, a wait for the loss after every step
    hf         ViTMAEForPreTraining (ViTForImageClassification for the other jobs) of transformers at its defaults, fp32
    hf_best    the same under bf16 autocast, with the attention implementation that is fastest on this machine
    hf_compiled    hf_best compiled as a whole, its attention chosen anew; only where `ours` is compiled (on a GPU, or
               with --compile)
The rows of Hugging Face need `pip install transformers`; their optimiser is that of `ours`.

Every row is a process of its own, and every repetition gives each row a turn. On a CPU a turn is one step; on a GPU it
is two steps that are not counted, then two to ten steps, about a third of a second. Between its turns a row gives back
all memory of the GPU but that of its weights and optimiser. A row that does not fit is left out, with a notice.

The figures are medians; the spread is (max - min) / median. TFLOP/s count the operations of the plain model, by
PyTorch's counter. The fraction of peak is relative to the median rate of matrix products, bf16 or fp32, in the same run
(`highest_tflops` is the rate of their best repetition).
"""

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from timm.layers import Attention
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import models_mae
import models_vit
from benchmarks.timing import (
    GpuFull,
    Step,
    adamw,
    create_parser,
    device_name,
    matmul_step,
    seconds,
    spread,
    take_turns,
    training_step,
    write_result,
)
from engine_finetune import head_losses
from util import errors, optim, speed
from util.amp import LossScaler
from util.checkpoint import configurations
from util.report.flops import count_flops

CLASSES = 1000
ROWS = ("ours", "ours_eager", "off", "hf", "hf_best", "hf_compiled")


def build_model(job: str, name: str) -> nn.Module:
    """Build a job's model as its script does, except for two flags, in fp32 on PyTorch's default device.

    Pre-training has --norm_pix_loss; fine-tuning has no stochastic depth (the script's --drop_path is 0.1).
    """
    if job == "pretrain":
        return models_mae.MODELS[name](norm_pix_loss=True)
    model = models_vit.MODELS[name](num_classes=CLASSES, global_pool=job == "finetune")
    return models_vit.make_linear_probe(model) if job == "linprobe" else model


def build_hf_model(config: dict, classes: int | None = None, attention: str | None = None) -> nn.Module:
    """Build the model of transformers of the same shape and norm_pix_loss, with its defaults for all else.

    Args:
        config: The shape and norm_pix_loss, as model_config in a checkpoint of this repository.
        classes: Number of classes of a classifier; None: an autoencoder.
        attention: Attention implementation, "sdpa" or "eager"; None: transformers' default.

    Returns:
        The model, whose output has `logits`, or for an autoencoder `loss`.
    """
    import transformers

    # Without the keys that are no arguments of the config classes, or that would replace their defaults.
    class_names = None if classes is None else [str(number) for number in range(classes)]
    hf_config = configurations.hugging_face_config(config, class_names, 0.75)
    for key in ("architectures", "model_type", "dtype", "layer_norm_eps"):
        del hf_config[key]
    if attention:
        hf_config["attn_implementation"] = attention

    if classes is not None:
        return transformers.ViTForImageClassification(transformers.ViTConfig(**hf_config))
    return transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**hf_config))


def build_optimizer(job: str, model: nn.Module, fused: bool = True) -> torch.optim.Optimizer:
    """Build a job's optimiser over the parameters that are trained; AdamW loops over them unless it is fused."""
    if job == "linprobe":
        return optim.LARS([p for p in model.parameters() if p.requires_grad], lr=0.1)
    return adamw(model, fused=fused, foreach=False)


def build_step(job: str, name: str, imgs: Tensor, targets: Tensor, args: argparse.Namespace, row: str) -> Step:
    """Build a training step of this repository's model.

    Args:
        job: "pretrain", "finetune" or "linprobe".
        name: Name of the model.
        imgs: Images [N, 3, H, W] on the device.
        targets: Classes [N] on the device.
        args: Flags of this script.
        row: "ours", "ours_eager" or "off".
    """
    device, fast = imgs.device, row != "off"

    # Precision: the flag's, or the reference's.
    amp = args.amp if fast else "fp16" if device.type == "cuda" else "off"
    model, scaler = build_model(job, name).to(device).train(), LossScaler(amp, device)

    # Speed-ups as the scripts apply them; or none, and timm's fused attention off, too.
    if fast:
        compiled = False if row == "ours_eager" else args.compile
        speed.prepare(model, device, scaler.amp, args.attention, compiled, args.grad_checkpoint)
    else:
        for module in model.modules():
            if isinstance(module, Attention):
                module.fused_attn = False

    def forward() -> Tensor:
        return model(imgs)[0] if job == "pretrain" else head_losses(model(imgs), targets)

    return training_step(model, build_optimizer(job, model, fast), scaler, forward, wait=not fast)


def build_hf_step(
    job: str, name: str, imgs: Tensor, targets: Tensor, amp: str, attention: str | None, compiled: bool
) -> Step:
    """Build a training step of transformers' model.

    Args:
        job: "pretrain", "finetune" or "linprobe".
        name: Name of this repository's model of the same shape.
        imgs: Images [N, 3, H, W] on the device.
        targets: Classes [N] on the device.
        amp: Mixed precision, "bf16" or "off".
        attention: Attention implementation, "sdpa" or "eager"; None: transformers' default.
        compiled: Whether to compile the model as a whole.
    """
    device = imgs.device
    model = build_hf_model(build_model(job, name).config, None if job == "pretrain" else CLASSES, attention)
    if job == "linprobe":
        model.vit.requires_grad_(False)
    model, scaler = model.to(device).train(), LossScaler(amp, device)
    if compiled:
        model.compile(dynamic=False)

    def forward() -> Tensor:
        return model(imgs).loss if job == "pretrain" else head_losses(model(imgs).logits, targets)

    return training_step(model, build_optimizer(job, model), scaler, forward)


def count_step_flops(job: str, name: str, batch_size: int) -> float:
    """Return the floating-point operations of a forward and a backward pass.

    Args:
        job: "pretrain", "finetune" or "linprobe".
        name: Name of the model.
        batch_size: Images per step.
    """
    with torch.device("meta"):  # no memory is needed to count
        model = build_model(job, name)
    return batch_size * count_flops(model, mask_ratio=0.75 if job == "pretrain" else None)


class Row:
    """Row in a process of its own, so that its memory and caches do not depend on the other rows."""

    def __init__(self, row: str, argv: list[str], setting: dict, script: str = __file__) -> None:
        """Start the process.

        Args:
            row: Name of the row.
            argv: The command line's flags, which the process gets, too.
            setting: What the row's `build` gets beside the flags.
            script: Benchmark that the row belongs to; with the flag --serve it calls `serve`.
        """
        command = [sys.executable, script, *argv, "--serve", row, "--setting", json.dumps(setting)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.peak_memory = 0.0

    def step(self) -> float:
        """Give the process a turn, update peak_memory (GB), and return the seconds of a step.

        Raises:
            GpuFull: The row does not fit into the GPU's memory; its process ends.
            SystemExit: The process ended during the turn.
            BrokenPipeError: The process had ended before the turn.
        """
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if answer.strip() == "full":
            raise GpuFull
        if not answer:
            raise SystemExit(
                f"error: the process of a row ended early (its messages are above): {' '.join(self.process.args)}"
            )
        took, self.peak_memory = map(float, answer.split())
        return took

    def close(self) -> None:
        """End the process, by closing its input, and wait for it."""
        self.process.stdin.close()
        self.process.wait()


def serve(args: argparse.Namespace, build: Callable[[str, argparse.Namespace, dict], Step]) -> None:
    """Take a turn per line of the standard input, as the process that a Row has started.

    Prints for each turn the seconds of a step and the peak memory so far in GB; or "full" if the GPU is, and ends.

    Args:
        args: Flags of the benchmark, with --serve and --setting.
        build: Returns the step of (row, args, setting).
    """
    device = torch.device(args.device)
    step = None  # built in the first turn, when Row is ready to hear that the GPU is full
    try:
        for _ in sys.stdin:
            step = step or build(args.serve, args, json.loads(args.setting))
            print(*(_gpu_turn if device.type == "cuda" else _cpu_turn)(step, device), flush=True)
    except torch.OutOfMemoryError:
        print("full", flush=True)


def _gpu_turn(step: Step, device: torch.device) -> tuple[float, float]:
    """Return the seconds of a step on the GPU, and the peak memory in GB."""
    # The first step allocates the memory that was given back. The second tells how many fill a third of a second.
    step()
    count = min(10, max(2, round(1 / 3 / seconds(step, device))))
    took = seconds(lambda: [step() for _ in range(count)], device) / count
    torch.cuda.empty_cache()
    return took, torch.cuda.max_memory_allocated(device) / 1e9


def _cpu_turn(step: Step, device: torch.device) -> tuple[float, float]:
    """Return the seconds of a step on the CPU, and the peak memory in GB."""
    took = seconds(step, device)
    time.sleep(0.3)  # OpenMP's threads spin for a while after their work; the next row is to have the cores
    status = Path("/proc/self/status").read_text()  # by hand since getrusage's peak may be the parent's
    return took, int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024 / 1e9


def choose_attention(argv: list[str], compiled: bool, attention: str | None) -> dict:
    """Choose the attention implementation of hf_best or hf_compiled.

    Args:
        argv: The command line's flags.
        compiled: Whether the model is compiled.
        attention: The implementation if the user has chosen one; None: the fastest on this machine, by trial.

    Returns:
        The row's setting.
    """
    if attention:
        return {"attention": attention, "compiled": compiled}
    fastest = {}
    for name in ("sdpa", "eager"):
        row = Row("hf_best", argv, {"attention": name, "compiled": compiled})
        try:
            fastest[name] = min(row.step() for _ in range(3))
        except GpuFull:
            fastest[name] = math.inf
        row.close()
    return {"attention": min(fastest, key=fastest.get), "compiled": compiled}


def build(row: str, args: argparse.Namespace, setting: dict) -> Step:
    """Build the step of a row on a batch of random images.

    Args:
        row: One of ROWS.
        args: Flags of this script.
        setting: For hf_best and hf_compiled: "attention" and "compiled".
    """
    torch.manual_seed(0)
    device = torch.device(args.device)
    imgs = torch.randn(args.batch_size, 3, 224, 224, device=device)
    targets = torch.randint(CLASSES, (args.batch_size,), device=device)
    common = (args.job, args.model, imgs, targets)
    if row in ("ours", "ours_eager", "off"):
        return build_step(*common, args, row)
    if row == "hf":
        return build_hf_step(*common, "off", None, False)
    return build_hf_step(*common, "bf16", setting["attention"], setting["compiled"])


def profile(args: argparse.Namespace) -> None:
    """Print the kernels (on a CPU the operations) that take most of the time, in 3 steps of the first of --rows.

    On a GPU also print how long the process takes to start the kernels of a step: if as long as the step, the GPU waits
    for the process.

    hf_best and hf_compiled run uncompiled, with transformers' default attention; --hf_attention is ignored.
    """
    device = torch.device(args.device)
    step = build((args.rows or ROWS)[0], args, {"attention": None, "compiled": False})
    for _ in range(3):
        seconds(step, device)

    # On a GPU a step returns once its kernels are started; the wait for the GPU before it is not counted.
    if device.type == "cuda":
        starts = []
        for _ in range(10):
            torch.cuda.synchronize(device)
            begin = time.perf_counter()
            step()
            starts.append(time.perf_counter() - begin)
        print(f"{statistics.median(starts):.4f} s to start the kernels of a step")

    # The time of each kernel.
    kind = torch.profiler.ProfilerActivity.CUDA if device.type == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as result:
        took = seconds(lambda: [step() for _ in range(3)], device) / 3
    order = f"self_{'cuda' if device.type == 'cuda' else 'cpu'}_time_total"
    print(f"{took:.4f} s per step; the table is the sum of 3 steps")
    print(result.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=90))


def summarise(name: str, row: Row, times: list[float], batch_size: int, work: float, peak: float) -> dict:
    """Turn a row's step times into images/s, TFLOP/s, share of the peak, spread and memory, for the JSON file.

    Args:
        name: Name of the row.
        row: The row, for its memory.
        times: Seconds of a step in each repetition.
        batch_size: Images per step.
        work: Floating-point operations per step.
        peak: TFLOP/s that the device sustains.
    """
    median = statistics.median(times)
    tflops = work / median / 1e12
    return {
        "name": name,
        "images_per_s": batch_size / median,
        "tflops": tflops,
        "fraction_of_peak": tflops / peak,
        "spread": spread(times),
        "peak_memory_gb": row.peak_memory,
        "seconds": times,
    }


def measure(args: argparse.Namespace, argv: list[str]) -> dict:
    """Time every row's training step, and matrix products, by turns.

    Args:
        args: Flags of this script.
        argv: The command line that they come from.

    Returns:
        The contents of the JSON file.
    """
    # The rows that apply, and their settings.
    device = torch.device(args.device)
    names = args.rows or list(ROWS)
    if not speed.compiles(device, args.compile):
        names = [name for name in names if name not in ("ours_eager", "hf_compiled")]
    settings = {
        row: choose_attention(argv, row == "hf_compiled", args.hf_attention)
        for row in ("hf_best", "hf_compiled")
        if row in names
    }

    # Time them and, for the fraction of peak, matrix products, by turns.
    rows = {row: Row(row, argv, settings.get(row, {})) for row in names}
    products = {"bf16": matmul_step(torch.bfloat16, device), "fp32": matmul_step(torch.float32, device)}
    timers = {name: row.step for name, row in rows.items()}
    timers |= {name: partial(seconds, step, device) for name, (step, _) in products.items()}
    times = take_turns(timers, args.steps)
    for row in rows.values():
        row.close()

    # The rates of the products; a row's fraction of peak refers to the faster kind.
    peak = {name: work / statistics.median(times[name]) / 1e12 for name, (_, work) in products.items()}
    work, best_peak = count_step_flops(args.job, args.model, args.batch_size), max(peak.values())
    return {
        "job": args.job,
        "model": args.model,
        "batch_size": args.batch_size,
        "n": args.steps,
        "peak_tflops": peak,
        "highest_tflops": {name: work / min(times[name]) / 1e12 for name, (_, work) in products.items()},
        "ours": {name: getattr(args, name) for name in ("amp", "attention", "compile", "grad_checkpoint")},
        **settings,
        "rows": [
            summarise(name, row, times[name], args.batch_size, work, best_peak)
            for name, row in rows.items()
            if name in times
        ],
        "torch": torch.__version__,
        "device": device_name(device),
    }


def print_table(args: argparse.Namespace, result: dict) -> None:
    """Print a heading, and a line per implementation: images per second, TFLOP/s, share of the peak, memory."""
    peak = ", ".join(
        f"{name} {value:.3g} (highest {result['highest_tflops'][name]:.3g})"
        for name, value in result["peak_tflops"].items()
    )
    chosen = ", ".join(f"{row} {result[row]['attention']}" for row in ("hf_best", "hf_compiled") if row in result)
    print(
        f"{args.model}, {args.job}, batch {args.batch_size}, n = {args.steps}; {result['device']}; torch "
        f"{result['torch']}; peak TFLOP/s: {peak}; attention: {chosen}"
    )
    print(f"{'':11} {'images/s':>9} {'TFLOP/s':>8} {'of peak':>8} {'spread':>7} {'memory GB':>10}")
    for row in result["rows"]:
        print(
            f"{row['name']:11} {row['images_per_s']:9.2f} {row['tflops']:8.3f} {row['fraction_of_peak']:8.1%} "
            f"{row['spread']:7.1%} {row['peak_memory_gb']:10.2f}"
        )


def get_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = create_parser(__doc__, steps=7)
    add = parser.add_argument
    add("--model", default="mae_vit_base_patch16")
    add("--job", default="pretrain", choices=("pretrain", "finetune", "linprobe"))
    add("--batch_size", default=16, type=int)
    add("--rows", nargs="+", choices=ROWS, help="default: all that apply")
    add("--profile", action="store_true", help="instead of measuring, print where the time of the first row goes")
    add("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"), help="mixed precision of the row ours")
    add("--attention", default="auto", choices=speed.ATTENTION, help="attention implementation of the row ours")
    add("--compile", action=argparse.BooleanOptionalAction, help="compile the row ours; default: on CUDA only")
    add("--grad_checkpoint", action="store_true", help="activation checkpointing in the row ours")
    attention_help = "attention implementation of hf_best and hf_compiled; default: the faster one, by trial"
    add("--hf_attention", choices=("sdpa", "eager"), help=attention_help)
    add("--serve", help=argparse.SUPPRESS)
    add("--setting", default="{}", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure, print the table, and write the JSON file; or profile; or take the turns of a row."""
    args = get_args()
    if args.serve:
        serve(args, build)
        return
    if args.profile:
        profile(args)
        return
    result = measure(args, sys.argv[1:])
    print_table(args, result)
    write_result(args.json, result)


if __name__ == "__main__":
    errors.run(main)
