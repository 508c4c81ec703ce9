"""The documentation: every public name is in it, every program of it runs."""

import importlib.util
import re
from pathlib import Path

import pytest

import tb_optax
from tb_optax import checkpoints, plots, recipes

DOCS = Path(__file__).parents[1] / "docs"


def test_every_public_name_is_in_the_reference():
    text = (DOCS / "reference.md").read_text()
    listed = set()
    for block in re.findall(r"```\{eval-rst\}\n(.*?)```", text, re.DOTALL):
        (module,) = re.findall(r"currentmodule:: (\S+)", block)
        names = re.findall(r"auto(?:function|class|exception):: (\w+)", block)
        assert not listed & {f"{module}.{name}" for name in names}
        listed |= {f"{module}.{name}" for name in names}
    public = {f"tb_optax.{name}" for name in tb_optax.__all__ if name != "recipes"}
    for module in (checkpoints, plots, recipes):
        public |= {f"{module.__name__}.{name}" for name in module.__all__}
    assert listed == public


def test_every_page_is_in_the_index():
    index = (DOCS / "index.md").read_text()
    pages = {path.stem for path in DOCS.glob("*.md")} - {"index"}
    assert pages == set(re.findall(r"^([\w-]+)$", index, re.MULTILINE))


EXAMPLES = {
    "images_nnx": ["--steps", "3", "--width", "8"],
    "images_linen": ["--steps", "3"],
    "language_model": ["--steps", "2"],
}


def run(name, arguments):
    """Load a program as a module, and call its main."""
    spec = importlib.util.spec_from_file_location(
        name, DOCS / "examples" / f"{name}.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main(arguments)


@pytest.mark.filterwarnings("ignore:no layer reaches")  # Toys are small.
@pytest.mark.filterwarnings("ignore:only one layer")
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run_at_toy_size(name, tmp_path):
    arguments = EXAMPLES[name]
    assert len((DOCS / "examples" / f"{name}.py").read_text().splitlines()) < 80
    if name != "images_linen":
        assert run(name, arguments) > 0
        return
    arguments = [*arguments, "--directory", str(tmp_path)]
    run(name, [*arguments, "--until", "2"])
    resumed = run(name, arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]
    assert resumed == run(name, [*arguments[:-1], str(tmp_path / "at_once")])


def test_all_examples_are_run():
    assert EXAMPLES.keys() == {path.stem for path in (DOCS / "examples").glob("*.py")}
