"""Draw multipliers of a ResNet-18 at initialization, by alpha and relative_alpha."""

import jax
import jax.numpy as jnp

import tb_optax


def main() -> None:
    """Write the picture next to this file."""
    from matplotlib.figure import Figure

    shapes, width = {}, 64
    for stage, outputs in enumerate((64, 128, 256, 512), 1):
        for block in (0, 1):
            shapes[f"layer{stage}.{block}.conv1"] = (3, 3, width, outputs)
            shapes[f"layer{stage}.{block}.conv2"] = (3, 3, outputs, outputs)
            if width != outputs:
                shapes[f"layer{stage}.{block}.shortcut"] = (1, 1, width, outputs)
            width = outputs
    keys = jax.random.split(jax.random.key(0), len(shapes))
    drawn = map(jax.random.normal, keys, shapes.values())
    params = dict(zip(shapes, drawn, strict=True))
    axes = tb_optax.MatrixAxes((2,), (3,), pooled=(0, 1))
    table = tb_optax.layer_analysis([tb_optax.Layer(x, axes) for x in shapes])(params)
    metrics = {"alpha": table.alpha, "relative_alpha": tb_optax.relative_alpha(table)}
    figure = Figure((8, 5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for panel, assign in ((upper, tb_optax.linear()), (lower, tb_optax.sigmoid())):
        for mark, (name, metric) in zip("ox", metrics.items(), strict=True):
            panel.plot(assign(metric, jnp.ones(len(shapes), bool)), mark, label=name)
        panel.set_ylabel(f"multiplier by {type(assign).__name__}")
    lower.legend(frameon=False)
    lower.set_xticks(range(len(shapes)), shapes, rotation=90, fontsize="small")
    figure.savefig(__file__.replace(".py", ".png"), dpi=80)


if __name__ == "__main__":
    main()
