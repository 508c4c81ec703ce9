"""Draw the multipliers of a ResNet-18 at initialization, by alpha and relative_alpha.

python docs/initial_multipliers.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
from matplotlib.figure import Figure

import tb_optax

conv = tb_optax.MatrixAxes((2,), (3,), pooled=(0, 1))
shapes, width = {}, 64
for stage, outputs in enumerate((64, 128, 256, 512), 1):
    for block in (0, 1):
        name = f"layer{stage}.{block}"
        shapes[f"{name}.conv1"] = (3, 3, width, outputs)
        shapes[f"{name}.conv2"] = (3, 3, outputs, outputs)
        if width != outputs:
            shapes[f"{name}.shortcut"] = (1, 1, width, outputs)
        width = outputs
keys = jax.random.split(jax.random.key(0), len(shapes))
pairs = zip(keys, shapes.items(), strict=True)
params = {name: jax.random.normal(key, shape) for key, (name, shape) in pairs}
table = tb_optax.layer_analysis([tb_optax.Layer(name, conv) for name in shapes])(params)

figure = Figure((8, 5), layout="constrained")
maps = {"linear(0.5, 1.5)": tb_optax.linear(), "sigmoid()": tb_optax.sigmoid()}
panels = figure.subplots(2, 1, sharex=True)
for axes, (name, assign) in zip(panels, maps.items(), strict=True):
    for metric, mark in ((table.alpha, "o"), (tb_optax.relative_alpha(table), "x")):
        multipliers = assign(metric, jnp.ones(len(shapes), bool))
        axes.plot(multipliers, mark, label="alpha" if mark == "o" else "relative_alpha")
    axes.axhline(1, color="0.6", linestyle=":", zorder=0)
    axes.set_ylabel(f"multiplier\n{name}")
axes.set_xticks(range(len(shapes)), shapes, rotation=90, fontsize="small")
axes.legend(frameon=False)
figure.savefig(Path(__file__).with_name("initial-multipliers.png"), dpi=80)
