"""Tile shapes, warps and pipeline stages of every kernel, as static tables.

Each entry says why it is there. An entry that no recorded run has confirmed says "predicted"; the
runs are in ``bench/results`` and what came of them in ``bench/NOTES.md``. Static tables rather than
autotuning: the same call then runs the same code everywhere, and every entry can be compiled and
checked where there is no GPU.
"""
