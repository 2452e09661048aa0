"""Make the tables of RESULTS.md and docs/ablations.md, on stdout, and its plots from the logs under results/.

    python scripts/results.py > tables.md              needs matplotlib: pip install matplotlib

Values are mean ± sample standard deviation over the seeds.

results/<dataset>/<row>/seed<S>.jsonl                           a run's log.txt; the last epoch counts
results/<imbalanced|segmentation>/<row>/seed<S>.jsonl
results/ablations/<variant>/seed<S>/<pretrain|probe|finetune|partial*>.jsonl
docs/results/*.png                                              the plots
"""

import json
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from recipes.ablations import TRAINABLE
from scripts.benchmark_tables import table
from util import errors
from util.command_line import Parser
from util.errors import UserError

try:
    import matplotlib

    matplotlib.use("Agg")  # draws into files, without a display
    from matplotlib import pyplot as plt
    from matplotlib.axes import Axes
except ImportError:
    matplotlib = None

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

# Comparisons by other figures, by their folder in results/: labels of the rows, and titles of the logs' figures.
COMPARISONS = {
    "imbalanced": (
        {"none": "all images weigh alike", "balanced": "`--class_weights balanced`"},
        {"test_acc1": "accuracy, %", "test_balanced_acc": "balanced accuracy, %", "test_macro_f1": "macro F1, %"},
    ),
    "segmentation": (
        {
            "finetune": "2,000 masks, pre-trained encoder",
            "scratch": "2,000 masks, from scratch",
            "finetune_few": "200 masks, pre-trained encoder",
            "scratch_few": "200 masks, from scratch",
        },
        {"test_miou": "mean IoU, %"},
    ),
}
# Folders in results/ that are no dataset's.
OTHER_FOLDERS = ("ablations", *COMPARISONS)

# Rows of a dataset's table, in order: name of the folder, label, and name of the figure in the log.
ROWS = (
    ("finetune", "fine-tuned", "test_acc1"),
    ("scratch", "from scratch", "test_acc1"),
    ("finetune_10pct", "fine-tuned on 10 % of the labels", "test_acc1"),
    ("scratch_10pct", "from scratch on 10 % of the labels", "test_acc1"),
    ("attentive", "attentive probe", "test_acc1"),
    ("probe", "linear probe", "test_acc1"),
    ("probe_pooled", "linear probe on the mean of the patches", "test_acc1"),
    ("probe_cls", "linear probe on the class token", "test_acc1"),
    ("knn", "20 nearest neighbours", "test_acc1"),
    ("pixels", "logistic regression on raw pixels", "test_acc1"),
    ("pixels", "20 nearest neighbours in raw pixels", "test_knn"),
)


class Summary(NamedTuple):
    """Mean, sample standard deviation (NaN for a single seed) and number of the seeds' values."""

    mean: float
    deviation: float
    count: int


def read_log(path: Path) -> list[dict]:
    """Read a log's lines of JSON, a dictionary each: one per epoch, or a single one without "epoch" (k-NN, pixels).

    Raises:
        UserError: It has no lines.
    """
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]
    if not lines:
        raise UserError(f"{path} holds no figures: remove it, or run its row again")
    return lines


def summarise(paths: list[Path], name: str = "test_acc1") -> Summary | None:
    """Summarise the last epochs' values of several logs; None if there are no logs that have them."""
    values = [last[name] for path in paths if name in (last := read_log(path)[-1])]
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


def datasets() -> None:
    """Print a table of what pre-training gains on each dataset, then a table of each dataset's rows, and plot these."""
    folders = [path for path in (ROOT / "results").iterdir() if path.is_dir() and path.name not in OTHER_FOLDERS]
    overview, tables = [], []
    for folder in sorted(folders):
        summaries = {(row, name): summarise(row_logs(folder, row), name) for row, _, name in ROWS}
        rows = [
            [label, format_summary(summary, 2), summary.count]
            for row, label, name in ROWS
            if (summary := summaries[row, name])
        ]
        tables.append(f"\n{folder.name}\n\n{table(['', 'accuracy, %', 'n'], rows)}")
        plot_dataset(folder)

        # Fine-tuned against from scratch, on all labels and on a tenth.
        for share, suffix in (("all", ""), ("10 %", "_10pct")):
            finetune, scratch = (summaries[row + suffix, "test_acc1"] for row in ("finetune", "scratch"))
            if finetune and scratch:
                gain = f"{finetune.mean - scratch.mean:+.1f}"
                overview.append([folder.name, share, *map(format_summary, (finetune, scratch)), gain])
    print(f"\nGains\n\n{table(['data set', 'labels', 'fine-tuned, %', 'from scratch, %', 'gain'], overview)}")
    print("\n".join(tables))


def row_logs(folder: Path, row: str) -> list[Path]:
    """Return the logs of a row of a dataset's table, one per seed."""
    return sorted(folder.glob(f"{row}/seed*.jsonl"))


def plot_dataset(folder: Path) -> None:
    """Plot the rows of a dataset, by the first seed's log: accuracy by epoch, or a level where a log has no epochs.

    Three panels, since their ranges differ: all layers trained; the encoder frozen, and raw pixels; and the accuracy of
    nearest neighbours on val/ during pre-training.

    Args:
        folder: Folder of the dataset's logs.
    """
    figure, (trained, frozen, pretraining) = plt.subplots(1, 3, figsize=(14, 4.4))
    trained.set_title("all layers trained")
    frozen.set_title("encoder frozen")
    pretraining.set_title("during pre-training")
    for row, label, name in ROWS:
        plot_row(trained if row.startswith(("finetune", "scratch")) else frozen, label, row_logs(folder, row), name)
    plot_row(pretraining, "20 nearest neighbours", row_logs(folder, "pretrain"), "test_knn")
    for panel in (trained, frozen, pretraining):
        panel.set(xlabel="epoch", ylabel="accuracy, %")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2)
    figure.suptitle(f"{folder.name}, first seed")
    figure.tight_layout()
    figure.savefig(PICTURES / f"{folder.name}.png", dpi=110)
    plt.close(figure)


def plot_row(panel: "Axes", label: str, paths: list[Path], name: str) -> None:
    """Add a row of a dataset's table to its plot.

    Args:
        panel: Axes of the plot.
        label: The row's label.
        paths: Logs of the row, one per seed, of which the first is drawn.
        name: Name of the figure in the log.
    """
    lines = [line for path in paths[:1] for line in read_log(path) if name in line]
    if lines and "epoch" in lines[0]:
        panel.plot([line["epoch"] + 1 for line in lines], [line[name] for line in lines], marker=".", label=label)
    elif lines:
        panel.axhline(lines[-1][name], linestyle=":", color="grey")
        panel.text(0.02, lines[-1][name], label, fontsize=7, va="bottom", transform=panel.get_yaxis_transform())


def comparisons() -> None:
    """Print a table for each comparison of COMPARISONS, of the rows that were run."""
    for name, (labels, figures) in COMPARISONS.items():
        rows = []
        for row, label in labels.items():
            summaries = [summarise(row_logs(ROOT / "results" / name, row), figure) for figure in figures]
            if all(summaries):
                rows.append([label, *(format_summary(summary) for summary in summaries), summaries[0].count])
        if rows:
            print(f"\n{name}\n\n{table(['', *figures.values(), 'n'], rows)}")


def main() -> None:
    """Print all tables, and draw all plots."""
    Parser(__doc__).parse_args()
    if matplotlib is None:
        raise UserError("this needs matplotlib: pip install matplotlib")
    PICTURES.mkdir(parents=True, exist_ok=True)
    datasets()
    comparisons()
    ablations()


if __name__ == "__main__":
    errors.run(main)
