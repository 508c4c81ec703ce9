"""Experiments with tb_optax; `python -m benchmarks.train` is the main one."""
