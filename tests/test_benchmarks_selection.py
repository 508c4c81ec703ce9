"""Which epoch stands for an arm, in the table and in a run with rows held out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from runs import TINY, final_state, timeless

from benchmarks import configs, data, models, records, report, train
from benchmarks.preemption import Preempted
from benchmarks.selection import best_on_test, selected

HELD_OUT = [*TINY, "--arms", "cal", "--validation", "70"]


def history(test, validation=None):
    """The rows of an arm with these accuracies."""
    times = {"train_seconds": 1.0, "analysis_seconds": 0.0}
    rows = [
        {"arm": "cal", "epoch": epoch, "test_accuracy": accuracy, **times}
        | {"train_loss": 0.5, "test_loss": None}
        for epoch, accuracy in enumerate(test, 1)
    ]
    for row, accuracy in zip(rows, validation or (), strict=False):
        row["validation_accuracy"] = accuracy
    return rows


def test_the_first_of_the_best_epochs_is_chosen():
    rows = history([0.1, 0.7, 0.9, 0.9, 0.8], [0.3, 0.5, 0.4, 0.5, 0.2])
    assert selected(rows)["epoch"] == 2
    assert best_on_test(rows)["epoch"] == 3
    # What the test set says plays no part in the choice.
    assert selected(history([1.0] * 5, [0.3, 0.5, 0.4, 0.5, 0.2]))["epoch"] == 2


def cells(table):
    header, _, row = table.splitlines()
    return {
        name.strip(): cell.strip()
        for name, cell in zip(header.split("|"), row.split("|"), strict=True)
    }


def test_the_table_names_each_accuracy():
    table = cells(report.arms_table(history([0.1, 0.9, 0.8], [0.5, 0.4, 0.2])))
    assert table["last"] == "80.00%"
    assert table["selected"] == "10.00%"
    assert table["best on test"] == "90.00%"
    assert "selected" not in cells(report.arms_table(history([0.1, 0.9, 0.8])))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with rows held out, stopped behind its first epoch and resumed."""
    path = tmp_path_factory.mktemp("held_out") / "run"
    arguments = [*HELD_OUT, "--no-plots", "--out", str(path)]
    with pytest.raises(Preempted):
        train._run(arguments, iter([False, True]).__next__)
    assert len(records.read(path / "metrics.jsonl")) == 1
    assert train.main([*arguments, "--resume"]) == 0
    return path


def test_rows_held_out_are_scored_by_the_trained_model(run):
    config = configs.parse(HELD_OUT).config
    dataset = data.load(config)
    state = final_state(run, "cal")
    model = models.build(
        config.model,
        num_classes=10,
        width=config.width,
        image_channels=1,
        rngs=nnx.Rngs(0),
    )
    nnx.update(model, state.params)
    nnx.update(model, state.batch_stats)
    images = dataset.preparation.normalise(jnp.asarray(dataset.validation_images))
    logits = np.asarray(model(images, train=False), np.float64)
    labels = dataset.validation_labels
    chosen = logits[np.arange(len(labels)), labels]
    loss = np.mean(np.log(np.exp(logits).sum(1)) - chosen)
    last = records.read(run / "metrics.jsonl")[-1]
    assert last["validation_accuracy"] == pytest.approx(
        np.mean(logits.argmax(1) == labels), abs=1e-6
    )
    assert last["validation_loss"] == pytest.approx(loss, rel=1e-4)


def test_the_rows_held_out_stay_the_same(run, capsys):
    before = (run / "metrics.jsonl").read_bytes()
    arguments = [*HELD_OUT, "--out", str(run), "--resume", "--validation", "71"]
    assert train.main(arguments) == 2
    assert "--validation is 71, but the run in" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == before


def test_holding_rows_out_behind_the_subset_changes_no_training(run, finished):
    plain = timeless(finished / "metrics.jsonl")
    own = ("validation_loss", "validation_accuracy")
    assert not any(name in row for row in plain for name in own)
    shared = [
        {name: value for name, value in row.items() if name not in own}
        for row in timeless(run / "metrics.jsonl")
    ]
    assert shared == [row for row in plain if row["arm"] == "cal"]
    jax.tree.map(
        np.testing.assert_array_equal,
        final_state(run, "cal"),
        final_state(finished, "cal"),
    )
    tables = (run / "table.md").read_text(), (finished / "table.md").read_text()
    assert ["| selected" in table for table in tables] == [True, False]
