"""Partwise and its contenders on the same rows: how many tokens a second each trains, and in how much memory.

`python -m benchmarks.speed OUT.jsonl` measures; `python -m benchmarks.speed.report` writes the page.

  cells.py       what is measured: model shape, method, mixture of rows, rows per step, goal
  mixtures.py    seeded lengths: tokens, target tokens and images of every row
  floor.py       the fewest seconds that a step can take on a GPU's matrix units
  rows.py        the mixtures as real rows, in the order in which every contender reads them
  settings.py    Partwise's best settings for each cell
  contenders/    one program per contender, each in a process of its own
  report.py      rows -> the page and its plot
"""
