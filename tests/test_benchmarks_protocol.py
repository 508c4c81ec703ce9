"""Studies: rates are tuned per arm, seeds are fresh, a kill changes nothing."""

import dataclasses
import itertools
import math
import os
import time
from typing import Any

import numpy as np
import pytest
from runs import Killed, assert_fails, compile_once, timeless

from benchmarks import accelerator, compare, findings, language, protocol, studies
from benchmarks.configs import LanguageConfig
from benchmarks.files import read_json, read_lines
from benchmarks.protocol import Trial, chosen, grid, plan


def nothing(*_: Any) -> Any:
    """Stands for what loads and trains."""


STUDY = protocol.Study(
    None,
    dict.fromkeys(("plain", "method", "mean")),
    {"mean": "method"},
    rates=(1.0, 2.0, 4.0),
    sweep_seeds=(1, 2),
    fresh_seeds=(11, 12, 13),
    load=nothing,
    make=nothing,
)


def simulated(best, noise=0.0):
    """Trials in the order in which a study does them, with losses that are made up.

    Each arm has its lowest loss at the rate in `best`; seeds differ by the noise.
    """
    losses, order = {}, []
    while todo := plan(STUDY, losses):
        for trial in todo:
            arm = STUDY.parents.get(trial.arm, trial.arm)
            distance = math.log2(trial.rate / best[arm]) ** 2
            losses[trial] = distance + noise * (trial.seed % 2)
            order.append(trial)
    return order, losses


def test_each_arm_has_its_own_rate_and_a_control_that_of_its_method():
    order, losses = simulated({"plain": 2.0, "method": 2.4}, noise=0.5)
    assert [chosen(STUDY, losses, arm) for arm in STUDY.arms] == [2.0, 2.0, 2.0]
    swept = {trial.arm for trial in order if trial.phase == "sweep"}
    assert swept == {"plain", "method"}
    _, losses = simulated({"plain": 2.0, "method": 3.9})
    assert [chosen(STUDY, losses, arm) for arm in STUDY.arms] == [2.0, 4.0, 4.0]


@pytest.mark.parametrize("best", [0.25, 0.5, 1.0, 2.0, 4.0, 16.0, 64.0])
def test_a_grid_grows_until_the_optimum_is_inside(best):
    order, losses = simulated({"plain": best, "method": 2.0})
    rates = sorted(grid(STUDY, losses, "plain"))
    np.testing.assert_allclose(np.diff(np.log2(rates)), 1)
    reach = 2.0**protocol.REACH
    if 1 / reach < best < 4 * reach:
        assert chosen(STUDY, losses, "plain") == best
        assert rates[0] < best < rates[-1]
    else:
        assert chosen(STUDY, losses, "plain") == rates[-1] == 4 * reach
    # The other arm needs no more than it has; nothing is trained twice.
    assert sorted(grid(STUDY, losses, "method")) == [1.0, 2.0, 4.0]
    assert len(set(order)) == len(order)


def test_a_rate_that_diverges_is_not_chosen():
    losses = dict.fromkeys(plan(STUDY, {}), 1.0)
    losses |= {t: 0.5 for t in losses if t.rate == 2}
    losses[Trial("sweep", "plain", 2.0, 2)] = math.nan
    assert chosen(STUDY, losses, "method") == 2.0
    assert chosen(STUDY, losses, "plain") != 2.0


def test_every_prefix_is_an_honest_result():
    order, _ = simulated({"plain": 2.0, "method": 16.0})
    phases = [trial.phase for trial in order]
    assert phases == sorted(phases, reverse=True)  # The sweep comes first.
    fresh = [trial for trial in order if trial.phase == "fresh"]
    swept = {trial.seed for trial in order if trial.phase == "sweep"}
    assert not swept & {trial.seed for trial in fresh}
    assert [(t.seed, t.arm) for t in fresh] == [
        *itertools.product(STUDY.fresh_seeds, STUDY.arms)
    ]
    base = [trial for trial in order if trial.rate in STUDY.rates][: 3 * 2]
    assert {trial.seed for trial in base} == {1}


# --- a study of two updates -----------------------------------------------------------

SMALL = {"width": 56, "depth": 1, "heads": 2, "length": 8, "windows": 3}
TINY = LanguageConfig(epochs=2, steps=2, batch_size=2, refresh=2, interval=2, **SMALL)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A directory of Python files, enough for each part."""
    root = tmp_path_factory.mktemp("text")
    for number in range(60):
        (root / f"module{number}.py").write_text(f"x{number} = {number}\n" * 4)
    (root / "test").mkdir()
    (root / "test" / "left_out.py").write_text("!" * 99)
    return root


@pytest.fixture(scope="module")
def tiny():
    """Registers the study under a name of its own, its programs compiled once."""
    made = {}

    def make(config, arm, data):
        if arm.name not in made:
            made[arm.name] = language.make_program(config, arm, data)
        return made[arm.name]

    names = ("uniform", "temp_balance", "temp_balance_mean")
    study = dataclasses.replace(
        studies.STUDIES["language-small"],
        config=TINY,
        arms={name: language.ARMS[name] for name in names},
        parents={"temp_balance_mean": "temp_balance"},
        rates=(1e-3, 2e-3),
        sweep_seeds=(1,),
        fresh_seeds=(11, 12),
        make=make,
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(protocol, "REACH", 1)
        compile_once(monkeypatch)
        monkeypatch.setitem(studies.STUDIES, "tiny", study)
        yield study


def run(out, text, *arguments):
    command = ["tiny", "--out", str(out), "--data-dir", str(text), *arguments]
    return compare.main(command)


def evaluations(path):
    """What a study has written down, without seconds."""
    return timeless(read_lines(path / "evaluations.jsonl"))


@pytest.fixture(scope="module")
def finished(tiny, text, tmp_path_factory):
    del tiny
    out = tmp_path_factory.mktemp("study") / "out"
    assert run(out, text) == 0
    return out


def test_a_study_ends_with_a_report(finished, capsys, text):
    rows = read_lines(finished / "evaluations.jsonl")
    tested = [row for row in rows if "test_loss" in row]
    # The test rows are read once by each fresh trial, after the last update.
    assert {(row["phase"], row["epoch"]) for row in tested} == {("fresh", TINY.epochs)}
    assert len(tested) == 3 * 2
    assert not list((finished / "running").iterdir())
    report = (finished / findings.REPORT).read_text()
    for words in ("Not finished", "nan"):
        assert words not in report
    for words in ("TempBalance, mean-matched", "equally many seconds", "Sweep"):
        assert words in report
    page = (finished / findings.PAGE).read_text()
    assert page.count("data:image/png;base64,") == 2
    before = (finished / "evaluations.jsonl").read_bytes()
    assert run(finished, text, "--resume", "--timing", "2") == 0
    assert (finished / "evaluations.jsonl").read_bytes() == before
    timed = read_json(finished / "timing.json", seconds=dict)["seconds"]
    assert {name: len(seconds) for name, seconds in timed.items()} == dict.fromkeys(
        ("uniform", "temp_balance", "temp_balance_mean"), 2
    )
    capsys.readouterr()


def test_a_study_without_a_finished_trial_has_a_report(tiny, tmp_path):
    directory = studies.Directory(tmp_path / "out", "tiny")
    directory.open("0", "benchmarks.compare", [])
    findings.write(directory)
    missing = len(tiny.rates) * len(tiny.swept)
    report = (directory.path / findings.REPORT).read_text()
    assert f"Not finished: {missing} trials of the sweep are missing." in report
    assert "Nothing is finished yet" in (directory.path / findings.PAGE).read_text()


def test_differences_in_the_report_are_those_of_the_lines(finished):
    rows = read_lines(finished / "evaluations.jsonl")
    loss = {(r["arm"], r["seed"]): r["test_loss"] for r in rows if "test_loss" in r}
    differences = [loss["temp_balance", s] - loss["uniform", s] for s in (11, 12)]
    margin = 12.706 * np.std(differences, ddof=1) / 2**0.5
    low, high = np.mean(differences) - margin, np.mean(differences) + margin
    cell = f"{np.mean(differences):+.4f} [{low:+.4f}, {high:+.4f}]"
    assert cell in (finished / findings.REPORT).read_text()


def test_killed_at_any_write_it_ends_with_the_same_lines(finished, text, tmp_path):
    out, real = tmp_path / "killed", os.replace
    for number in itertools.count(1, 7):
        writes = itertools.count(1)

        def replace(*arguments, number=number, writes=writes):
            if next(writes) == number:
                raise Killed
            return real(*arguments)

        try:
            with pytest.MonkeyPatch.context() as monkeypatch:
                monkeypatch.setattr(os, "replace", replace)
                assert run(out, text, "--resume", "--no-plots") == 0
            break
        except Killed:
            pass
    assert number > 10
    assert evaluations(out) == evaluations(finished)


def test_a_study_goes_on_with_its_own_data_and_setting_alone(
    finished, text, tmp_path, capsys, monkeypatch, tiny
):
    def fails(out, *words, path=text, more=("--resume", "--no-plots")):
        arguments = ["tiny", "--out", str(out), "--data-dir", str(path), *more]
        assert_fails(compare.main, capsys, arguments, *words)

    fails(finished, "--resume", more=())
    fails(tmp_path / "new", "0 bytes", path=tmp_path)
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "file").touch()
    fails(tmp_path / "foreign", "holds no run: no study.json")
    other = dataclasses.replace(tiny, config=dataclasses.replace(TINY, width=64))
    monkeypatch.setitem(studies.STUDIES, "tiny", other)
    fails(finished, "another --out", "'width': 56")


def test_several_machines_with_little_time_make_one_study(
    tiny, text, finished, tmp_path, monkeypatch
):
    monkeypatch.setitem(studies.STUDIES, "images-check", tiny)
    path = tmp_path / "images"
    done = []
    for seconds in (0.0, 1.0, math.inf):
        deadline = time.monotonic() + seconds
        accelerator.train_images(path, text, True, [], deadline)
        done.append(len(read_lines(path / "evaluations.jsonl")))
        assert not (path / "running").exists()
    assert done[0] == 0
    assert evaluations(path) == evaluations(finished)
