"""Make the tables of RESULTS.md, on stdout, and its plots from the logs under results/.

    python scripts/results.py > tables.md              needs matplotlib: pip install matplotlib

Values are mean ± sample standard deviation over the seeds.

results/<dataset>/<row>/seed<S>.jsonl                           a run's log.txt; the last epoch counts
results/ablations/<variant>/seed<S>/<pretrain|probe|finetune|partial*>.jsonl
docs/results/*.png                                              the plots
"""

import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # draws into files, without a display
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from recipes.ablations import TRAINABLE
from scripts.benchmark_tables import table

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs" / "results"

# Per ablation: title, label of the horizontal axis ("": the variants are names), and (variant, its tick) in order.
PLOTS = {
    "mask_ratio": (
        "Masking ratio (paper, Fig. 5)",
        "share of patches masked",
        [("ratio0.25", 0.25), ("ratio0.5", 0.5), ("ratio0.625", 0.625), ("default", 0.75), ("ratio0.875", 0.875)],
    ),
    "decoder_depth": (
        "Decoder depth (Table 1a)",
        "blocks of the decoder",
        [("depth1", 1), ("default", 2), ("depth4", 4), ("depth8", 8)],
    ),
    "targets": ("Targets (Table 1d)", "", [("default", "pixels"), ("normalised", "normalised pixels")]),
    "sampling": (
        "Mask sampling (Table 1f)",
        "",
        [("default", "random 75"), ("block50", "block 50"), ("block75", "block 75"), ("grid75", "grid 75")],
    ),
    "length": (
        "Length of pre-training (Fig. 7)",
        "epochs",
        [("epochs10", 10), ("epochs20", 20), ("default", 40), ("epochs80", 80)],
    ),
}

# Rows of a dataset's table, in order: name of the folder, label.
ROWS = {
    "finetune": "fine-tuned",
    "scratch": "from scratch",
    "attentive": "attentive probe",
    "probe": "linear probe",
    "knn": "20 nearest neighbours",
    "pixels": "logistic regression on raw pixels",
}


class Summary(NamedTuple):
    """Mean, sample standard deviation (NaN for a single seed) and number of the seeds' values."""

    mean: float
    deviation: float
    count: int


def read_log(path: Path) -> list[dict]:
    """Read a log's lines of JSON, a dictionary each: one per epoch, or a single one without "epoch" (k-NN, pixels)."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]


def summarise(paths: list[Path], name: str = "test_acc1") -> Summary | None:
    """Summarise the last epochs' values of several logs; None if there are no logs."""
    values = [read_log(path)[-1][name] for path in paths]
    if not values:
        return None
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return Summary(statistics.mean(values), deviation, len(values))


def format_summary(summary: Summary | None, digits: int = 1) -> str:
    """Format a table's cell: the mean, with the standard deviation if there are several seeds."""
    if summary is None:
        return "not measured"
    deviation = f" ± {summary.deviation:.{digits}f}" if summary.count > 1 else ""
    return f"{summary.mean:.{digits}f}{deviation}"


def format_counts(summaries: Iterable[Summary | None]) -> str:
    """Format how many seeds a table or a plot rests on: "n = 3", or "n = 1 or 3" if that differs."""
    counts = sorted({summary.count for summary in summaries if summary}) or [0]
    return "n = " + " or ".join(map(str, counts))


def ablation_logs(variant: str, step: str) -> list[Path]:
    """Return the logs of one step of an ablation's variant, one per seed."""
    return sorted((ROOT / "results" / "ablations" / variant).glob(f"seed*/{step}.jsonl"))


def plot(name: str, title: str, axis: str, ticks: list, series: dict[str, list[Summary | None]]) -> None:
    """Plot means with standard deviations, a panel per series, since their ranges differ.

    Args:
        name: File name of the plot, without .png; "length" makes the horizontal axis logarithmic.
        title: Title of the plot.
        axis: Label of the horizontal axis.
        ticks: Position of each variant on the horizontal axis, or its name: then they are spaced evenly.
        series: Label of a panel -> a summary per variant; None leaves a gap.
    """
    figure, panels = plt.subplots(1, len(series), figsize=(4.2 * len(series), 3.2), squeeze=False)
    numeric = all(isinstance(tick, int | float) for tick in ticks)
    positions = ticks if numeric else range(len(ticks))
    for panel, (label, summaries) in zip(panels[0], series.items(), strict=True):
        # Variants that were not run leave a gap. Only numbers are joined by a line.
        points = [(at, *summary[:2]) for at, summary in zip(positions, summaries, strict=True) if summary]
        if points:
            at, mean, deviation = zip(*points, strict=True)
            panel.errorbar(at, mean, deviation, marker="o", capsize=3, linestyle="-" if numeric else "none")

        # Each length is twice the one before: on a logarithmic axis they are evenly spaced.
        if name == "length":
            panel.set_xscale("log", base=2)
        panel.set_xticks(list(positions), [f"{tick:g}" if numeric else tick for tick in ticks])
        if not numeric:
            panel.set_xlim(-0.5, len(ticks) - 0.5)
        panel.set_title(label)
        panel.set_xlabel(axis)
        panel.set_ylabel("accuracy, %")
        panel.grid(alpha=0.3)
    figure.suptitle(f"{title}: mean ± s.d., {format_counts(sum(series.values(), []))}")
    figure.tight_layout()
    figure.savefig(PICTURES / f"{name}.png", dpi=110)
    plt.close(figure)


def ablations() -> None:
    """Print a table and write a plot for each of the six ablations."""
    # Five ablations of pre-training: every variant is fine-tuned and linearly probed.
    for name, (title, axis, variants) in PLOTS.items():
        ticks = [tick for _, tick in variants]
        finetune, probe = (
            [summarise(ablation_logs(variant, step)) for variant, _ in variants] for step in ("finetune", "probe")
        )
        plot(name, title, axis, ticks, {"fine-tuning": finetune, "linear probe": probe})
        rows = [["fine-tuning", *map(format_summary, finetune)], ["probe", *map(format_summary, probe)]]
        print(f"\n{title}\n\n{table([format_counts(finetune + probe), *ticks], rows)}")

    # Partial fine-tuning of the default variant; with all six blocks it is ordinary fine-tuning.
    partial = [summarise(ablation_logs("default", f"partial{blocks}")) for blocks in TRAINABLE]
    partial.append(summarise(ablation_logs("default", "finetune")))
    blocks = [*map(float, TRAINABLE), 6.0]
    plot("partial", "Partial fine-tuning (Fig. 9)", "blocks that are trained", blocks, {"fine-tuning": partial})
    head = [format_counts(partial), *(f"{number:g} block{'s' * (number != 1)}" for number in blocks)]
    print(f"\nPartial fine-tuning (Fig. 9)\n\n{table(head, [['fine-tuning', *map(format_summary, partial)]])}")


def plot_row(panel: Axes, label: str, paths: list[Path], summary: Summary | None) -> None:
    """Add a row of a dataset's table to its plot: the first seed's accuracy by epoch.

    Args:
        panel: Axes of the plot.
        label: The row's label.
        paths: Logs of the row, one per seed.
        summary: Their summary; drawn as a level where the log has no epochs, as for nearest neighbours.
    """
    points = [
        (line["epoch"] + 1, line["test_acc1"]) for path in paths[:1] for line in read_log(path) if "epoch" in line
    ]
    if points:
        panel.plot(*zip(*points, strict=True), marker=".", label=label)
    elif summary:
        panel.axhline(summary.mean, linestyle=":", color="grey")
        panel.text(0.2, summary.mean, label, fontsize=7, va="bottom", transform=panel.get_yaxis_transform())


def datasets() -> None:
    """Print a table for each dataset and plot its rows, by the first seed's log.

    A row is a curve by epoch, or a level where its log has no epochs (k-NN, raw pixels).
    """
    folders = [path for path in (ROOT / "results").iterdir() if path.is_dir() and path.name != "ablations"]
    for folder in sorted(folders):
        figure, panel = plt.subplots(figsize=(6, 3.6))
        rows = []
        for row, label in ROWS.items():
            paths = sorted(folder.glob(f"{row}/seed*.jsonl"))
            summary = summarise(paths)
            rows.append([label, format_summary(summary, 2), summary.count if summary else 0])
            plot_row(panel, label, paths, summary)
        print(f"\n{folder.name}\n\n{table(['', 'accuracy, %', 'n'], rows)}")

        panel.set(xlabel="epoch", ylabel="accuracy, %", title=f"{folder.name}, first seed")
        panel.grid(alpha=0.3)
        panel.legend()
        figure.tight_layout()
        figure.savefig(PICTURES / f"{folder.name}.png", dpi=110)
        plt.close(figure)


if __name__ == "__main__":
    PICTURES.mkdir(parents=True, exist_ok=True)
    datasets()
    ablations()
