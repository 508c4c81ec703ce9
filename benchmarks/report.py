"""The tables a run ends with."""

from collections.abc import Sequence

from benchmarks.arms import ARMS
from benchmarks.cells import table
from benchmarks.records import Row
from benchmarks.selection import best_on_test, selected

_LEGEND = (
    "Accuracies on the test set: `last`, of the last epoch; `selected`, of the first "
    "epoch with the best validation accuracy, if rows are held out; `best on test`, of "
    "the epoch that the test set itself chose, as published and too high."
)


def arms_table(metrics: Sequence[Row]) -> str:
    """Return one row per arm: its accuracies, and the seconds of all its epochs."""
    rows = []
    for arm in dict.fromkeys(row["arm"] for row in metrics):
        epochs = [row for row in metrics if row["arm"] == arm]
        analysis = sum(row["analysis_seconds"] for row in epochs)
        seconds = sum(row["train_seconds"] for row in epochs) + analysis
        rows.append(
            {
                "arm": f"{arm} ({ARMS[arm].title})",
                "epochs": len(epochs),
                "train loss": _loss(epochs[-1]["train_loss"]),
                "test loss": _loss(epochs[-1]["test_loss"]),
                "last": _accuracy(epochs[-1]),
                **_selected(epochs),
                "best on test": _accuracy(best_on_test(epochs)),
                "seconds": f"{seconds:.1f}",
                "in analysis": f"{analysis / seconds:.1%}",
            }
        )
    return table(rows)


def layer_table(layers: Sequence[Row], arm: str) -> str:
    """Return one row per layer of an arm: its final weights."""
    own = [row for row in layers if row["arm"] == arm]
    last = max(row["epoch"] for row in own)
    rows = []
    for row in own:
        if row["epoch"] == last:
            cells = {
                "layer": row["layer"],
                "alpha": f"{row['alpha']:.3f}" if row["fitted"] else "not fitted",
                "KS distance": f"{row['ks_distance']:.3f}" if row["fitted"] else "",
                "tail size": row["tail_size"],
                "N": row["eigenvalue_count"],
            }
            if ARMS[arm].balanced:
                cells["multiplier"] = f"{row['multiplier']:.3f}"
                cells["tuned"] = "yes" if row["tuned"] else "no"
            rows.append(cells)
    return table(rows)


def write(metrics: Sequence[Row], layers: Sequence[Row]) -> str:
    """Return all tables as Markdown."""
    arms = dict.fromkeys(row["arm"] for row in layers)
    parts = [arms_table(metrics), _LEGEND]
    parts += [
        f"{ARMS[arm].title}: layers\n\n{layer_table(layers, arm)}" for arm in arms
    ]
    return "\n\n".join(parts) + "\n"


def _selected(epochs: Sequence[Row]) -> dict[str, str]:
    if "validation_accuracy" not in epochs[-1]:
        return {}
    return {"selected": _accuracy(selected(epochs))}


def _accuracy(row: Row) -> str:
    return f"{row['test_accuracy']:.2%}"


def _loss(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
