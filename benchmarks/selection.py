"""Which epoch of an arm stands for it."""

from collections.abc import Sequence

from benchmarks.records import Row


def selected(rows: Sequence[Row]) -> Row:
    """Return the row with the best validation accuracy, the first of equal ones.

    The test set has no part in it: its accuracy there is that of a model chosen
    beforehand.
    """
    return max(rows, key=lambda row: row["validation_accuracy"])


def best_on_test(rows: Sequence[Row]) -> Row:
    """Return the row with the best test accuracy, the first of equal ones.

    The published statistic.  The test set chooses its own best epoch, so that the
    accuracy is too high; it serves the comparison with published tables.
    """
    return max(rows, key=lambda row: row["test_accuracy"])
