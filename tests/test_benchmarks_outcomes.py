"""What a comparison reports: its numbers beside SciPy's, on records made up here."""

import dataclasses
import json

import numpy as np
import pytest
from runs import eight_images
from scipy import stats

from benchmarks import configs, curves, outcomes, records, tables
from benchmarks.comparison import Comparison

EPOCHS, SEEDS, ARMS = 5, (43, 44, 45, 46), ("cal", "tb")
BASE = dataclasses.replace(configs.DIGITS, epochs=EPOCHS, batch_size=3)
IMAGES = 6  # Of eight, in batches of three.
TUNED = [("blocks/0", True), ("blocks/1", False)]


@pytest.fixture
def made_up(tmp_path):
    """A comparison, and the lines of each of its runs by arm and seed.

    Arm tb lacks two epochs of its last seed, and one seed of cal diverges.
    """
    comparison = Comparison(tmp_path, "made-up", {"base": BASE}, ARMS, SEEDS)
    comparison = comparison.save(
        ["made-up", "--data-dir", "/home/somebody", "--resume"]
    )
    rng = np.random.default_rng(0)
    lines = {}
    for seed in SEEDS:
        directory = comparison.opened("base", seed, eight_images())
        for arm in ARMS:
            epochs = EPOCHS - 2 if (arm, seed) == ("tb", 46) else EPOCHS
            rows = [
                {
                    "arm": arm,
                    "epoch": epoch,
                    **{
                        name: float(rng.uniform())
                        for name in (
                            "train_loss",
                            "test_loss",
                            "test_accuracy",
                            "validation_accuracy",
                            "train_seconds",
                        )
                    },
                    "analysis_seconds": 0.1 * (arm == "tb"),
                }
                for epoch in range(1, epochs + 1)
            ]
            if (arm, seed) == ("cal", 44):
                rows[3]["train_loss"] = float("nan")
            records.append(directory.metrics, rows)
            tables_of_layers = [
                {"arm": arm, "epoch": epoch, "layer": layer, "tuned": tuned}
                | {"alpha": float(rng.uniform(2, 4)) if tuned else None}
                for epoch in range(epochs + 1)
                for layer, tuned in TUNED
            ]
            records.append(directory.layers, tables_of_layers)
            (directory.checkpoints / arm / str(epochs)).mkdir(parents=True)
            lines[arm, seed] = rows
    return comparison, lines


def row_of(report, words, arm):
    """The cells of an arm in the table behind these words."""
    table = report[report.index(words) :]
    [line] = [
        line for line in table.split("\n\n")[1].split("\n") if f"| {arm} (" in line
    ]
    return [cell.strip() for cell in line.strip("|").split("|")]


def column(rows, name):
    return [row[name] for row in rows]


def last(rows):
    return 100 * rows[-1]["test_accuracy"]


def selected(rows):
    return 100 * rows[np.argmax(column(rows, "validation_accuracy"))]["test_accuracy"]


def best(rows):
    return 100 * max(column(rows, "test_accuracy"))


@pytest.mark.parametrize(
    ("words", "statistic"),
    [
        ("behind the last epoch", last),
        ("best on the validation set", selected),
        ("selected on the test set", best),
    ],
)
def test_accuracies_are_those_of_scipy(made_up, words, statistic):
    comparison, lines = made_up
    outcomes.write(comparison)
    report = (comparison.path / "report.md").read_text()
    cal = np.array([statistic(lines["cal", seed]) for seed in SEEDS])
    tb = np.array([statistic(lines["tb", seed]) for seed in SEEDS[:3]])
    for arm, values in (("cal", cal), ("tb", tb)):
        _, count, accuracy, _ = row_of(report, words, arm)
        assert count == str(len(values))
        assert accuracy == f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"
    low, high = stats.ttest_rel(tb, cal[:3]).confidence_interval(0.95)
    *_, difference = row_of(report, words, "tb")
    mean = np.mean(tb - cal[:3])
    assert difference == f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
    assert row_of(report, words, "cal")[-1] == ""


def test_speeds_are_paired_and_leave_the_first_epoch_out(made_up):
    comparison, lines = made_up
    outcomes.write(comparison)
    report = (comparison.path / "report.md").read_text()
    speeds = {}
    for run, rows in lines.items():
        seconds = np.add(
            column(rows, "train_seconds"), column(rows, "analysis_seconds")
        )
        speeds[run] = IMAGES * (EPOCHS - 1) / seconds[1:].sum()
    cal = np.array([speeds["cal", seed] for seed in SEEDS])
    ratios = np.array([speeds["tb", seed] for seed in SEEDS[:3]]) / cal[:3]
    cells = row_of(report, "Images per second", "cal")
    assert cells[1] == f"{cal.mean():.0f} ± {cal.std(ddof=1):.0f}"
    low, high = stats.t.interval(0.95, 2, ratios.mean(), stats.sem(ratios))
    cells = row_of(report, "Images per second", "tb")
    assert cells[2] == f"{ratios.mean():.3f} [{low:.3f}, {high:.3f}]"


def test_what_is_missing_or_diverged_is_named(made_up):
    comparison, _ = made_up
    outcomes.write(comparison)
    report = (comparison.path / "report.md").read_text()
    assert "Not finished: base/tb seed 46 (3 of 5 epochs)." in report
    assert "A loss was not finite: base/cal seed 44 (first in epoch 4)." in report
    assert "--data-dir DIRECTORY" in report
    assert "/home" not in report


def test_of_one_seed_there_is_no_interval(made_up):
    comparison, lines = made_up
    outcomes.write(dataclasses.replace(comparison, seeds=SEEDS[:1]))
    report = (comparison.path / "report.md").read_text()
    assert "One seed" in report
    cal, tb = (last(lines[arm, SEEDS[0]]) for arm in ARMS)
    cells = row_of(report, "behind the last epoch", "tb")
    assert cells[1:] == ["1", f"{tb:.2f}", f"{tb - cal:+.2f}"]


def test_variants_are_held_against_the_first(made_up):
    comparison, lines = made_up
    both = dataclasses.replace(
        comparison, configs={"base": BASE, "other": BASE}, arms=("cal",)
    )
    for seed in SEEDS:
        directory = both.opened("other", seed, eight_images())
        rows = [row | {"test_accuracy": 0.5} for row in lines["cal", seed]]
        records.append(directory.metrics, rows)
        (directory.checkpoints / "cal" / str(EPOCHS)).mkdir(parents=True)
    outcomes.write(both)
    report = (comparison.path / "report.md").read_text()
    cal = np.array([last(lines["cal", seed]) for seed in SEEDS])
    low, high = stats.t.interval(0.95, 3, 50 - cal.mean(), stats.sem(cal))
    table = report[report.index("behind the last epoch") :].split("\n\n")[1]
    assert f"{50 - cal.mean():+.2f} [{low:+.2f}, {high:+.2f}]" in table.split("\n")[3]


def test_pictures_are_of_all_seeds(made_up):
    comparison, _ = made_up
    assert {path.name for path in curves.write(comparison)} == {
        "alpha.png",
        "learning.png",
    }
    for path in comparison.path.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 20_000
    outcomes.write(comparison)
    report = (comparison.path / "report.md").read_text()
    assert "(alpha.png)" in report
    assert "(learning.png)" in report


def test_alpha_is_averaged_over_the_seeds_that_are_furthest():
    def row(epoch, alpha, *, tuned=True):
        return {"arm": "tb", "epoch": epoch, "layer": "a"} | {
            "tuned": tuned,
            "alpha": alpha,
        }

    rows = {
        1: [row(0, 2.0), row(1, 3.0)],
        2: [row(0, 4.0), row(1, None, tuned=False)],
        3: [row(0, 9.0)],
    }
    assert curves.average(rows) == [row(0, 3.0), row(1, 3.0)]


def test_a_comparison_is_a_section_of_the_readme(made_up, tmp_path):
    comparison, _ = made_up
    outcomes.write(comparison)
    results = tmp_path / "results"
    results.mkdir()
    summary = (comparison.path / "summary.json").read_text()
    assert len(summary) < 200_000
    assert json.loads(summary)["name"] == "made-up"
    (results / "compare_made-up.json").write_text(summary)
    (results / "compare_made-up_alpha.png").write_bytes(b"")
    rendered = tables.render(results)
    report = (comparison.path / "report.md").read_text()
    assert "](results/compare_made-up_alpha.png)" in rendered
    for part in report.strip().split("\n\n"):
        assert part in rendered
