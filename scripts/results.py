"""RESULTS.md's tables, on stdout, and its pictures, from the logs under results/.

    python scripts/results.py > tables.md              needs matplotlib: pip install matplotlib

Values are mean ± sample standard deviation of the seeds.

results/<dataset>/<row>/seed<S>.jsonl                           a run's log.txt; the last epoch counts
results/ablations/<variant>/seed<S>/<pretrain|probe|finetune|partial*>.jsonl
docs/results/*.png                                              the pictures
"""

import json
import statistics
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from recipes.ablations import TRAINABLE
from scripts.benchmark_tables import table

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs" / "results"
# By ablation: title, what the horizontal axis says, (variant, its mark), in order.
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
# A dataset's rows, in the table's order.
ROWS = {
    "finetune": "fine-tuned",
    "scratch": "from scratch",
    "attentive": "attentive probe",
    "probe": "linear probe",
    "knn": "20 nearest neighbours",
    "pixels": "logistic regression on raw pixels",
}

Found = tuple[float, float, int] | None  # mean, sample standard deviation, number


def lines(path: Path) -> list[dict]:
    """A log's epochs."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]


def final(paths: list[Path], name: str = "test_acc1") -> Found:
    """Mean, sample standard deviation and number of the last epochs' values; None where there are none."""
    values = [lines(path)[-1][name] for path in paths]
    if not values:
        return None
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else float("nan"), len(values)


def words(found: Found, digits: int = 1) -> str:
    if found is None:
        return "not measured"
    mean, deviation, count = found
    return f"{mean:.{digits}f}" + (f" ± {deviation:.{digits}f}" if count > 1 else "")


def seeds(founds: list[Found]) -> str:
    """How many seeds are behind a table or a picture."""
    return "n = " + " or ".join(map(str, sorted({found[2] for found in founds if found}) or [0]))


def ablation(variant: str, step: str) -> list[Path]:
    return sorted((ROOT / "results" / "ablations" / variant).glob(f"seed*/{step}.jsonl"))


def plot(name: str, title: str, axis: str, marks: list, series: dict[str, list[Found]]) -> None:
    """Means with standard deviations, a panel per series, since their ranges differ."""
    figure, panels = plt.subplots(1, len(series), figsize=(4.2 * len(series), 3.2), squeeze=False)
    numbers = all(isinstance(mark, int | float) for mark in marks)
    for panel, (label, found) in zip(panels[0], series.items(), strict=True):
        places = marks if numbers else range(len(marks))
        points = [(place, *value[:2]) for place, value in zip(places, found, strict=True) if value]
        if points:
            at, mean, deviation = zip(*points, strict=True)
            panel.errorbar(at, mean, deviation, marker="o", capsize=3, linestyle="-" if numbers else "none")
        if name == "length":
            panel.set_xscale("log", base=2)
        panel.set_xticks(list(places), [f"{mark:g}" if numbers else mark for mark in marks])
        if not numbers:
            panel.set_xlim(-0.5, len(marks) - 0.5)
        panel.set_title(label)
        panel.set_xlabel(axis)
        panel.set_ylabel("accuracy, %")
        panel.grid(alpha=0.3)
    figure.suptitle(f"{title}: mean ± s.d., {seeds(sum(series.values(), []))}")
    figure.tight_layout()
    figure.savefig(PICTURES / f"{name}.png", dpi=110)
    plt.close(figure)


def ablations() -> None:
    """The six tables and plots."""
    for name, (title, axis, variants) in PLOTS.items():
        found = {step: [final(ablation(variant, step)) for variant, _ in variants] for step in ("finetune", "probe")}
        plot(
            name,
            title,
            axis,
            [mark for _, mark in variants],
            {"fine-tuning": found["finetune"], "linear probe": found["probe"]},
        )
        rows = [[label, *map(words, found[step])] for step, label in (("finetune", "fine-tuning"), ("probe", "probe"))]
        print(f"\n{title}\n\n{table([seeds(sum(found.values(), [])), *(mark for _, mark in variants)], rows)}")
    found = [final(ablation("default", f"partial{number}")) for number in TRAINABLE]
    found.append(final(ablation("default", "finetune")))
    blocks = [*map(float, TRAINABLE), 6.0]
    plot("partial", "Partial fine-tuning (Fig. 9)", "blocks that are trained", blocks, {"fine-tuning": found})
    head = [seeds(found), *(f"{number:g} block{'s' * (number != 1)}" for number in blocks)]
    print(f"\nPartial fine-tuning (Fig. 9)\n\n{table(head, [['fine-tuning', *map(words, found)]])}")


def datasets() -> None:
    """A table per dataset, and a picture of its first seed's runs by epoch."""
    for folder in sorted(path for path in (ROOT / "results").iterdir() if path.is_dir() and path.name != "ablations"):
        figure, panel = plt.subplots(figsize=(6, 3.6))
        rows = []
        for row, label in ROWS.items():
            paths = sorted(folder.glob(f"{row}/seed*.jsonl"))
            found = final(paths)
            rows.append([label, words(found, 2), found[2] if found else 0])
            points = [
                (line["epoch"] + 1, line["test_acc1"]) for path in paths[:1] for line in lines(path) if "epoch" in line
            ]
            if points:
                panel.plot(*zip(*points, strict=True), marker=".", label=label)
            elif found:
                panel.axhline(found[0], linestyle=":", color="grey")
                panel.text(0.2, found[0], label, fontsize=7, va="bottom", transform=panel.get_yaxis_transform())
        print(f"\n{folder.name}\n\n{table(['', 'accuracy, %', 'n'], rows)}")
        panel.set(xlabel="epoch", ylabel="accuracy, %", title=f"{folder.name}, {paths[0].stem if paths else ''}")
        panel.grid(alpha=0.3)
        panel.legend()
        figure.tight_layout()
        figure.savefig(PICTURES / f"{folder.name}.png", dpi=110)
        plt.close(figure)


if __name__ == "__main__":
    PICTURES.mkdir(parents=True, exist_ok=True)
    datasets()
    ablations()
