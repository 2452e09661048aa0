"""Try changes that might make the pre-training step faster on a GPU, one at a time, against the step as it is.

    python benchmarks/tuning.py --model mae_vit_large_patch16 --batch_size 256 --json tuning.json

The first table has the rows below, each in a process of its own, timed by turns as in benchmarks/step.py:
    blocks          the step of the scripts: blocks compiled one by one, fused attention, fused AdamW
    whole           the model compiled as a whole
    autotune        blocks compiled with mode="max-autotune-no-cudagraphs"
    graphs          the model compiled as a whole with mode="reduce-overhead": CUDA graphs
    foreach         AdamW's foreach implementation
    plain           attention by matrix products and softmax
    half, double    half and twice the batch size
The second table has the times of the attention kernels alone, forward and backward in bf16, at the shapes of the
encoder and the decoder in pre-training and of the encoder in fine-tuning. By default PyTorch chooses among them.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import Block
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import models_mae
from benchmarks.step import Row, serve
from benchmarks.timing import (
    Step,
    adamw,
    create_parser,
    device_name,
    interleave,
    spread,
    take_turns,
    training_step,
    write_result,
)
from util import errors, speed
from util.amp import LossScaler

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
ROWS = ("blocks", "plain", "foreach", "half", "double", "autotune", "whole", "graphs")


def batch_of(row: str, batch_size: int) -> int:
    """Return the batch size of a row."""
    return {"half": batch_size // 2, "double": 2 * batch_size}.get(row, batch_size)


def build(row: str, args: argparse.Namespace, _: dict) -> Step:
    """Build the training step of a row.

    Args:
        row: One of ROWS.
        args: Flags of this script.
        _: Setting of the row; not used.
    """
    # Everything as the scripts have it, except for what the row changes.
    torch.manual_seed(0)
    device = torch.device(args.device)
    model = models_mae.MODELS[args.model](norm_pix_loss=True).to(device).train()
    scaler = LossScaler("auto", device)
    imgs = torch.randn(batch_of(row, args.batch_size), 3, 224, 224, device=device)
    optimizer = adamw(model, foreach=True) if row == "foreach" else adamw(model, fused=True)
    attention = "plain" if row == "plain" else "fused"
    speed.prepare(model, device, scaler.amp, attention, row not in ("whole", "autotune", "graphs"), False)

    # Compile in the row's way where that is not block by block.
    if row == "autotune":
        for module in model.modules():
            if isinstance(module, Block):
                module.compile(dynamic=False, mode="max-autotune-no-cudagraphs")
    elif row in ("whole", "graphs"):
        model.compile(dynamic=False, mode="reduce-overhead" if row == "graphs" else None)

    def forward() -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return model(imgs)[0]

    return training_step(model, optimizer, scaler, forward)


def measure_steps(args: argparse.Namespace, argv: list[str]) -> list[dict]:
    """Time a training step of each variant in args.rows, in a process of its own.

    Args:
        args: Flags of this script.
        argv: The command line that they come from.

    Returns:
        A dict per variant with its name, images per second, spread and peak memory; none for one that the GPU lacks
        memory for.
    """
    rows = {row: Row(row, argv, {}, script=__file__) for row in args.rows}
    times = take_turns({row: process.step for row, process in rows.items()}, args.steps, warm_ups=1)
    table = []
    for row, process in rows.items():
        process.close()
        if row not in times:
            continue
        table.append(
            {
                "name": row,
                "images_per_s": batch_of(row, args.batch_size) / statistics.median(times[row]),
                "spread": spread(times[row]),
                "peak_memory_gb": process.peak_memory,
            }
        )
    return table


def attention_step(row: str, shape: tuple[int, int, int, int], device: torch.device) -> Step:
    """Build a step of 20 forward and backward passes of attention in bf16.

    Args:
        row: Name of the kernel, a key of KERNELS.
        shape: Shape of queries, keys and values, [N, heads, L, d].
        device: Their device.
    """
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    grad = torch.randn(shape, device=device, dtype=torch.bfloat16)

    def step() -> None:
        for _ in range(20):
            with sdpa_kernel(KERNELS[row]):
                F.scaled_dot_product_attention(q, k, v).backward(grad)

    return step


def measure_attention(args: argparse.Namespace) -> list[dict]:
    """Time each attention kernel alone at each shape; one that raises an error there is left out, with a notice.

    Returns:
        A dict per shape and kernel: "place", "name", and "ms", milliseconds per forward and backward pass.
    """
    device, table = torch.device(args.device), []
    width, heads = (models_mae.MODELS[args.model].keywords[name] for name in ("embed_dim", "num_heads"))
    dim = width // heads
    shapes = {"encoder": (50, heads, dim), "decoder": (197, 16, 32), "fine-tuning": (197, heads, dim)}
    for place, (tokens, heads_here, dim_here) in shapes.items():
        # A kernel that does not support the device or the shape raises an error at its first call.
        steps: dict[str, Callable] = {}
        for row in KERNELS:
            step = attention_step(row, (args.batch_size, heads_here, tokens, dim_here), device)
            try:
                step()
            except RuntimeError as error:
                print(f"notice: the kernel {row} is left out for {place}: {str(error).splitlines()[0]}")
                continue
            steps[row] = step

        # By turns; a step is 20 passes.
        times = interleave(steps, device, args.steps)
        table += [
            {"place": place, "name": row, "ms": 1000 * statistics.median(values) / 20} for row, values in times.items()
        ]
    return table


def get_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = create_parser(__doc__, steps=5)
    parser.add_argument("--model", default="mae_vit_large_patch16", choices=list(models_mae.MODELS))
    parser.add_argument("--batch_size", default=256, type=int)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    parser.add_argument("--setting", default="{}", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure both tables (kernels on a GPU only) and print them; write the JSON file if --json names one.

    With --serve, be the process that times one row for another process of this script instead.
    """
    args = get_args()
    if args.serve:
        serve(args, build)
        return

    # The kernels first, while no row holds memory of the GPU.
    device = torch.device(args.device)
    attention = measure_attention(args) if device.type == "cuda" else []
    result = {
        "model": args.model,
        "batch_size": args.batch_size,
        "n": args.steps,
        "device": device_name(device),
        "torch": torch.__version__,
        "attention": attention,
        "rows": measure_steps(args, sys.argv[1:]),
    }

    base = result["rows"][0]["images_per_s"]
    for row in result["rows"]:
        rate = row["images_per_s"]
        print(
            f"{row['name']:10} {rate:9.1f} images/s, {rate / base:.3f} of the first row, spread {row['spread']:.1%}, "
            f"{row['peak_memory_gb']:.1f} GB"
        )
    for row in result["attention"]:
        print(f"{row['place']:12} {row['name']:10} {row['ms']:.3f} ms")
    write_result(args.json, result)


if __name__ == "__main__":
    errors.run(main)
