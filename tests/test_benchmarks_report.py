"""What runs are reported as: numbers next to SciPy's, on records made up here."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
from runs import eight_images
from scipy import stats

from benchmarks import configs, plots, report, tables
from benchmarks.cells import page
from benchmarks.experiments import Experiment
from benchmarks.files import finite
from benchmarks.runs import LAYERS, METRICS

EPOCHS, SEEDS, ARMS = 5, (43, 44, 45, 46), ("cal", "tb")
BASE = dataclasses.replace(configs.DIGITS, epochs=EPOCHS, batch_size=3)
IMAGES = 6  # Of eight, in batches of three.
TUNED = [("blocks/0", True), ("blocks/1", False)]


def history(test, validation=None):
    """The epochs of a run with these accuracies."""
    rows = {"epoch": range(1, len(test) + 1), "test_accuracy": test}
    rows |= dict.fromkeys(("train_loss", "test_loss"), 0.5)
    rows |= dict.fromkeys(("train_seconds", "analysis_seconds"), 1.0)
    if validation is not None:
        rows["validation_accuracy"] = validation
    return pd.DataFrame(rows)


def test_the_first_of_the_best_epochs_is_chosen():
    validation = [0.3, 0.5, 0.4, 0.5, 0.2]
    found = report.outcome(history([0.1, 0.7, 0.9, 0.9, 0.8], validation))
    assert (found["selected"], found["selected_epoch"]) == (0.7, 2)
    assert (found["best"], found["best_epoch"]) == (0.9, 3)
    assert found["last"] == 0.8
    # What the test set says plays no part in the choice.
    assert report.outcome(history([1.0] * 5, validation))["selected_epoch"] == 2
    assert "selected" not in report.outcome(history([1.0] * 5))


def write(run, metrics, layers):
    """Writes the record of a run, as if it had been trained."""
    run.start(eight_images())
    run.write(run.record() | {METRICS: [*map(finite, metrics)], LAYERS: layers})


@pytest.fixture
def made_up(tmp_path):
    """A comparison, and the rows of each of its runs by arm and seed.

    Arm tb lacks two epochs of its last seed, and one seed of cal diverges.
    """
    path = tmp_path / "made-up"
    experiment = Experiment(path, "made-up", {"base": BASE}, ARMS, SEEDS)
    arguments = ["made-up", "--data-dir", "/home/somebody", "--resume"]
    experiment = experiment.save("benchmarks.compare", arguments)
    rng, rows = np.random.default_rng(0), {}
    for run in experiment.runs():
        arm, seed = run.arm, run.config.seed
        epochs = EPOCHS - 2 if (arm, seed) == ("tb", 46) else EPOCHS
        names = ("train_loss", "test_loss", "test_accuracy", "validation_accuracy")
        rows[arm, seed] = [
            {"epoch": epoch, "analysis_seconds": 0.1 * (arm == "tb")}
            | {name: rng.uniform() for name in (*names, "train_seconds")}
            for epoch in range(1, epochs + 1)
        ]
        if (arm, seed) == ("cal", 44):
            rows[arm, seed][3]["train_loss"] = float("nan")
        layers = [
            {"epoch": epoch, "layer": layer, "tuned": tuned}
            | {"alpha": rng.uniform(2, 4) if tuned else None}
            for epoch in range(epochs + 1)
            for layer, tuned in TUNED
        ]
        write(run, rows[arm, seed], layers)
    return experiment, rows


def written(experiment):
    report.write(experiment)
    return (experiment.path / "report.md").read_text()


def row_of(text, words, start):
    """The cells of the row that starts so, in the table after these words."""
    lines = text[text.index(words) :].split("\n\n")[1].split("\n")
    [line] = [line for line in lines if line.startswith(f"| {start}")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def column(rows, name):
    return np.array([row[name] for row in rows])


def last(rows):
    return 100 * rows[-1]["test_accuracy"]


def selected(rows):
    return 100 * rows[np.argmax(column(rows, "validation_accuracy"))]["test_accuracy"]


def best(rows):
    return 100 * max(column(rows, "test_accuracy"))


@pytest.mark.parametrize(
    ("words", "statistic"),
    [
        ("after the last epoch", last),
        ("best on the validation set", selected),
        ("selected on the test set", best),
    ],
)
def test_accuracies_are_those_of_scipy(made_up, words, statistic):
    experiment, rows = made_up
    text = written(experiment)
    cal = np.array([statistic(rows["cal", seed]) for seed in SEEDS])
    tb = np.array([statistic(rows["tb", seed]) for seed in SEEDS[:3]])
    for arm, values in (("cal", cal), ("tb", tb)):
        _, count, accuracy, _ = row_of(text, words, arm)
        assert count == str(len(values))
        assert accuracy == f"{values.mean():.2f} ± {values.std(ddof=1):.2f}"
    low, high = stats.ttest_rel(tb, cal[:3]).confidence_interval(0.95)
    mean = np.mean(tb - cal[:3])
    assert row_of(text, words, "tb")[-1] == f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"
    assert row_of(text, words, "cal")[-1] == ""


def test_speeds_are_paired_and_leave_the_first_epoch_out(made_up):
    experiment, rows = made_up
    text, speeds = written(experiment), {}
    for run, own in rows.items():
        seconds = column(own, "train_seconds") + column(own, "analysis_seconds")
        speeds[run] = IMAGES * (EPOCHS - 1) / seconds[1:].sum()
    cal = np.array([speeds["cal", seed] for seed in SEEDS])
    ratios = np.array([speeds["tb", seed] for seed in SEEDS[:3]]) / cal[:3]
    cells = row_of(text, "Images per second", "cal")
    assert cells[1] == f"{cal.mean():.0f} ± {cal.std(ddof=1):.0f}"
    low, high = stats.t.interval(0.95, 2, ratios.mean(), stats.sem(ratios))
    cells = row_of(text, "Images per second", "tb")
    assert cells[2] == f"{ratios.mean():.3f} [{low:.3f}, {high:.3f}]"


def test_what_is_missing_or_diverged_is_named(made_up):
    text = written(made_up[0])
    assert "Not finished: base/tb seed 46 (3 of 5 epochs)." in text
    assert "A loss was not finite: base/cal seed 44 (first in epoch 4)." in text
    assert "--data-dir DIRECTORY" in text
    assert "/home" not in text


def test_one_seed_has_no_interval(made_up):
    experiment, rows = made_up
    text = written(dataclasses.replace(experiment, seeds=SEEDS[:1]))
    assert "One seed" in text
    cal, tb = (last(rows[arm, SEEDS[0]]) for arm in ARMS)
    cells = row_of(text, "after the last epoch", "tb")
    assert cells[1:] == ["1", f"{tb:.2f}", f"{tb - cal:+.2f}"]


def test_variants_are_compared_with_the_first(made_up):
    experiment, rows = made_up
    configs = {"base": BASE, "other": BASE}
    both = dataclasses.replace(experiment, configs=configs, arms=("cal",))
    for run in both.runs():
        if run.variant == "other":
            own = rows["cal", run.config.seed]
            write(run, [row | {"test_accuracy": 0.5} for row in own], [])
    cal = np.array([last(rows["cal", seed]) for seed in SEEDS])
    low, high = stats.t.interval(0.95, 3, 50 - cal.mean(), stats.sem(cal))
    cells = row_of(written(both), "after the last epoch", "other")
    assert cells[-1] == f"{50 - cal.mean():+.2f} [{low:+.2f}, {high:+.2f}]"


def test_pictures_are_of_all_seeds(made_up):
    experiment, _ = made_up
    names = {path.name for path in plots.write_comparison(experiment)}
    assert names == {"alpha.png", "learning.png"}
    for path in experiment.path.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size > 20_000
    text = written(experiment)
    assert "(alpha.png)" in text
    assert "(learning.png)" in text


def test_alpha_is_averaged_over_the_seeds_that_are_furthest():
    def row(seed, epoch, alpha):
        own = {"variant": "base", "arm": "tb", "seed": seed, "layer": "a"}
        return own | {"epoch": epoch, "alpha": alpha, "tuned": alpha is not None}

    rows = [row(1, 0, 2.0), row(1, 1, 3.0), row(2, 0, 4.0), row(2, 1, None)]
    averaged = plots.average(pd.DataFrame([*rows, row(3, 0, 9.0)]))
    assert averaged[["epoch", "alpha"]].values.tolist() == [[0, 3.0], [1, 3.0]]
    assert averaged["tuned"].all()


def test_a_comparison_is_a_section_of_the_readme(made_up, tmp_path):
    text = written(made_up[0])
    results = tmp_path / "results"
    results.mkdir()
    summary = (made_up[0].path / "summary.json").read_text()
    assert json.loads(summary)["name"] == "made-up"
    (results / "compare_made-up.json").write_text(summary)
    (results / "compare_made-up_alpha.png").write_bytes(b"")
    rendered = tables.render(results)
    assert "](results/compare_made-up_alpha.png)" in rendered
    for part in text.strip().split("\n\n"):
        assert part in rendered


def test_a_page_needs_nothing_else(tmp_path):
    picture = tmp_path / "alpha.png"
    picture.write_bytes(b"\x89PNG")
    rows = [{"arm": "tb <TempBalance>", "last": "98.00%"}]
    layers = [{"layer": f"blocks/{i}", "alpha": "2.1"} for i in range(3)]
    sections = [("Arms", rows), ("Layers", layers)]
    content = page("resnet & digits", "Of the test set.", sections, [picture])
    assert '<img alt="alpha" src="data:image/png;base64,iVBORw==">' in content
    assert content.count("src=") == 1
    assert "http" not in content
    assert "href" not in content
    for text in ("<h1>resnet &amp; digits</h1>", "tb &lt;TempBalance&gt;", "blocks/2"):
        assert text in content
    assert content.count("<details>") == content.count("</details>") == 1
