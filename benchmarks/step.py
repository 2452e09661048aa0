"""How fast a training step is: ours, ours with every speed-up off, and Hugging Face's model, in one interleaved run.

    python benchmarks/step.py --model mae_vit_base_patch16 --batch_size 16 --json step.json
    python benchmarks/step.py --model vit_base_patch16 --job finetune --batch_size 16
    python benchmarks/step.py --model vit_base_patch16 --job linprobe --batch_size 16

The rows of Hugging Face need `pip install transformers`. A step is forward, backward and update (AdamW; LARS for the
probe) on a batch of random images that is on the device already. The rows:
    ours       as the scripts run it: fused optimiser, no waiting; --amp, --attention, --compile and --grad_checkpoint
               are the scripts' flags, with their defaults
    ours_eager where ours is compiled: the same, not compiled
    off        what the reference does: fp16 with a scaler on a GPU, fp32 on a CPU; plain attention, an optimiser with a
               loop over the parameters, a wait for the loss after every step
    hf         ViTMAEForPreTraining (ViTForImageClassification for the other jobs) of transformers at its defaults, fp32
    hf_best    the same under bf16 autocast, with the attention that was fastest here
    hf_compiled    where ours is compiled (on a GPU, or with --compile): hf_best compiled as a whole, its attention
               chosen anew
The rows of Hugging Face use our optimiser. Every row is a process of its own, every repetition runs a step of each in
turn, on a GPU two to ten, a third of a second's worth, after one that is not counted; between its turns a row gives
the GPU all but its weights and optimiser back, and one that doesn't fit is left out and said. The figures are medians,
the spread is (max - min) / median. TFLOP/s are those of the plain model by PyTorch's counter; the fraction is of what
matrix products, bf16 or fp32, sustain in the same run, likewise a median (`highest_tflops` is the best repetition's).
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
from pathlib import Path

import torch
from timm.layers import Attention
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import models_mae
import models_vit
from benchmarks.timing import Step, device_name, matmul_step, seconds
from engine_finetune import head_losses
from util import optim, speed
from util.amp import LossScaler
from util.checkpoint import formats

CLASSES = 1000
ROWS = ("ours", "ours_eager", "off", "hf", "hf_best", "hf_compiled")


def our_model(job: str, name: str) -> nn.Module:
    """The job's model as its script builds it, in fp32 on the CPU."""
    if job == "pretrain":
        return models_mae.MODELS[name](norm_pix_loss=True)
    model = models_vit.MODELS[name](num_classes=CLASSES, global_pool=job == "finetune")
    return models_vit.make_linear_probe(model) if job == "linprobe" else model


def hf_model(config: dict, classes: int | None = None, attention: str | None = None) -> nn.Module:
    """transformers' model of the shape that our model_config describes, with its own defaults for the rest; an
    autoencoder, with classes a classifier. `loss` is in its output."""
    import transformers

    names = None if classes is None else [str(number) for number in range(classes)]
    theirs = formats.hugging_face_config(config, names, 0.75)
    for key in ("architectures", "model_type", "dtype", "layer_norm_eps"):
        del theirs[key]
    theirs |= {"attn_implementation": attention} if attention else {}
    if classes is not None:
        return transformers.ViTForImageClassification(transformers.ViTConfig(**theirs))
    return transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**theirs))


def optimizer_of(job: str, model: nn.Module, fused: bool = True) -> torch.optim.Optimizer:
    """The job's optimiser, over what is trained."""
    trained = [p for p in model.parameters() if p.requires_grad]
    if job == "linprobe":
        return optim.LARS(trained, lr=0.1)
    return torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.05, fused=fused, foreach=False)


def our_step(job: str, name: str, imgs: Tensor, targets: Tensor, args: argparse.Namespace, row: str) -> Step:
    """A step of the row "ours", "ours_eager" or "off"."""
    device, fast = imgs.device, row != "off"
    amp = args.amp if fast else "fp16" if device.type == "cuda" else "off"
    model, scaler = our_model(job, name).to(device).train(), LossScaler(amp, device)
    if fast:
        compiled = False if row == "ours_eager" else args.compile
        speed.prepare(model, device, scaler.amp, args.attention, compiled, args.grad_checkpoint)
    else:
        for module in model.modules():
            if isinstance(module, Attention):
                module.fused_attn = False
    optimizer = optimizer_of(job, model, fast)

    def step() -> None:
        with scaler.autocast():
            loss = model(imgs)[0] if job == "pretrain" else head_losses(model(imgs), targets)
        scaler.backward(loss)
        scaler.step(optimizer, model.parameters(), None)
        if not fast:
            loss.item()

    return step


def hf_step(
    job: str, name: str, imgs: Tensor, targets: Tensor, amp: str, attention: str | None, compiled: bool
) -> Step:
    """One step of transformers' model; attention None: its default."""
    device = imgs.device
    model = hf_model(our_model(job, name).config, None if job == "pretrain" else CLASSES, attention)
    if job == "linprobe":
        model.vit.requires_grad_(False)
    model, scaler = model.to(device).train(), LossScaler(amp, device)
    if compiled:
        model.compile(dynamic=False)
    optimizer = optimizer_of(job, model)

    def step() -> None:
        with scaler.autocast():
            loss = model(imgs).loss if job == "pretrain" else head_losses(model(imgs).logits, targets)
        scaler.backward(loss)
        scaler.step(optimizer, model.parameters(), None)

    return step


def count_flops(job: str, name: str, batch_size: int) -> float:
    """Floating-point operations of a step of the plain model, by PyTorch's counter, without memory for the weights."""
    with torch.device("meta"):
        model = our_model(job, name).train()
        speed.prepare(model, torch.device("cpu"), "off", "plain", False, False)
        size = model.config["img_size"]
        imgs, targets = torch.empty(1, 3, size, size), torch.zeros(1, dtype=torch.long)
        if job == "linprobe":
            model.head[0].eval()  # its statistics want more than one image
        with FlopCounterMode(display=False) as counter:
            (model(imgs)[0] if job == "pretrain" else head_losses(model(imgs), targets)).backward()
    return float(counter.get_total_flops()) * batch_size


class Full(Exception):
    """A row doesn't fit into the GPU's memory."""


class Row:
    """A row in a process of its own, so that neither its memory nor its caches suffer from the others'."""

    def __init__(self, row: str, words: list[str], setting: dict, script: str = __file__) -> None:
        command = [sys.executable, script, *words, "--serve", row, "--setting", json.dumps(setting)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.peak_memory = 0.0

    def step(self) -> float:
        """Run a step there; returns its seconds. Raises Full."""
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if answer.strip() == "full":
            raise Full
        if not answer:
            raise SystemExit(f"a row ended early: {' '.join(self.process.args)}")
        took, self.peak_memory = map(float, answer.split())
        return took

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def serve(args: argparse.Namespace, build: Callable[[str, argparse.Namespace, dict], Step]) -> None:
    """Take a turn per line of stdin: the other end of Row.

    Prints a step's seconds and the peak memory so far in GB; where the GPU is full "full" instead, and ends.
    """
    device = torch.device(args.device)
    step = None  # built in the first turn, so that its memory, too, is asked for then
    try:
        for _ in sys.stdin:
            step = step or build(args.serve, args, json.loads(args.setting))
            print(*(_gpu_turn if device.type == "cuda" else _cpu_turn)(step, device), flush=True)
    except torch.OutOfMemoryError:
        print("full", flush=True)


def _gpu_turn(step: Step, device: torch.device) -> tuple[float, float]:
    # The first step makes the room that was given back. The second says how many fill a third of a second.
    step()
    count = min(10, max(2, round(1 / 3 / seconds(step, device))))
    took = seconds(lambda: [step() for _ in range(count)], device) / count
    torch.cuda.empty_cache()
    return took, torch.cuda.max_memory_allocated(device) / 1e9


def _cpu_turn(step: Step, device: torch.device) -> tuple[float, float]:
    took = seconds(step, device)
    time.sleep(0.3)  # until its threads no longer wait actively for more work
    status = Path("/proc/self/status").read_text()  # getrusage's peak would be the parent's
    return took, int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024 / 1e9


def best_attention(words: list[str], compiled: bool, wanted: str | None) -> dict:
    """The setting of hf_best or hf_compiled: the attention that makes it fastest here, or the one wanted."""
    if wanted:
        return {"attention": wanted, "compiled": compiled}
    times = []
    for attention in ("sdpa", "eager"):
        row = Row("hf_best", words, setting := {"attention": attention, "compiled": compiled})
        try:
            times.append((min(row.step() for _ in range(3)), setting))
        except Full:
            times.append((math.inf, setting))
        row.close()
    return min(times, key=lambda pair: pair[0])[1]


def build(row: str, args: argparse.Namespace, setting: dict) -> Step:
    """The step of a row."""
    torch.manual_seed(0)
    device = torch.device(args.device)
    imgs = torch.randn(args.batch_size, 3, 224, 224, device=device)
    targets = torch.randint(CLASSES, (args.batch_size,), device=device)
    common = (args.job, args.model, imgs, targets)
    if row in ("ours", "ours_eager", "off"):
        return our_step(*common, args, row)
    if row == "hf":
        return hf_step(*common, "off", None, False)
    return hf_step(*common, "bf16", setting["attention"], setting["compiled"])


def profile(args: argparse.Namespace) -> None:
    """Print the kernels, or on a CPU the operations, that take most of the time of a step of the first of --rows."""
    device = torch.device(args.device)
    step = build((args.rows or ROWS)[0], args, {"attention": None, "compiled": False})
    for _ in range(3):
        seconds(step, device)
    kind = torch.profiler.ProfilerActivity.CUDA if device.type == "cuda" else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[kind]) as result:
        took = seconds(lambda: [step() for _ in range(3)], device) / 3
    order = f"self_{'cuda' if device.type == 'cuda' else 'cpu'}_time_total"
    print(f"{took:.4f} s a step; the table is of 3 steps")
    print(result.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=90))


def measure(args: argparse.Namespace, words: list[str]) -> dict:
    """The whole benchmark; returns what goes into the file."""
    device = torch.device(args.device)
    names = args.rows or list(ROWS)
    if not speed.compiles(device, args.compile):
        names = [name for name in names if name not in ("ours_eager", "hf_compiled")]
    settings = {
        row: best_attention(words, row == "hf_compiled", args.hf_attention)
        for row in ("hf_best", "hf_compiled")
        if row in names
    }
    rows = {row: Row(row, words, settings.get(row, {})) for row in names}
    peaks = {name: matmul_step(dtype, device) for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))}
    times: dict[str, list[float]] = {name: [] for name in (*rows, *peaks)}
    for repetition in range(-2, args.steps):  # the first two warm up
        for name in list(times):
            try:
                took = rows[name].step() if name in rows else seconds(peaks[name][0], device)
            except Full:
                print(f"{name} doesn't fit into the GPU's memory beside the others")
                rows.pop(name).close()
                del times[name]
                continue
            if repetition >= 0:
                times[name].append(took)
    peak = {name: work / statistics.median(times[name]) / 1e12 for name, (_, work) in peaks.items()}
    highest = {name: work / min(times[name]) / 1e12 for name, (_, work) in peaks.items()}
    work = count_flops(args.job, args.model, args.batch_size)
    table = []
    for row in rows:
        median = statistics.median(times[row])
        table.append(
            {
                "name": row,
                "images_per_s": args.batch_size / median,
                "tflops": work / median / 1e12,
                "fraction_of_peak": work / median / 1e12 / max(peak.values()),
                "spread": (max(times[row]) - min(times[row])) / median,
                "peak_memory_gb": rows[row].peak_memory,
                "seconds": times[row],
            }
        )
    for row in rows.values():
        row.close()
    return {
        "job": args.job,
        "model": args.model,
        "batch_size": args.batch_size,
        "n": args.steps,
        "peak_tflops": peak,
        "highest_tflops": highest,
        "ours": {name: getattr(args, name) for name in ("amp", "attention", "compile", "grad_checkpoint")},
        **settings,
        "rows": table,
        "torch": torch.__version__,
        "device": device_name(device),
    }


def main() -> None:
    """Measure, print the table, write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mae_vit_base_patch16")
    parser.add_argument("--job", default="pretrain", choices=("pretrain", "finetune", "linprobe"))
    parser.add_argument("--batch_size", default=16, type=int)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", default=7, type=int, help="repetitions")
    parser.add_argument("--rows", nargs="+", choices=ROWS, help="default: all that apply")
    parser.add_argument("--profile", action="store_true", help="instead: where the first row's time goes, by kernel")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--amp", default="auto", choices=("auto", "bf16", "fp16", "off"), help="of the row ours")
    parser.add_argument("--attention", default="auto", choices=speed.ATTENTION, help="of the row ours")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, help="the row ours; default: on CUDA")
    parser.add_argument("--grad_checkpoint", action="store_true", help="in the row ours")
    parser.add_argument("--hf_attention", choices=("sdpa", "eager"), help="of hf_best and hf_compiled; default: tried")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--setting", default="{}", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(args, build)
        return
    if args.profile:
        profile(args)
        return
    result = measure(args, sys.argv[1:])
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
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
