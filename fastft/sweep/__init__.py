"""Sweeps: a grid of runs, one process each, and the table of what they found.

grid.py     the file: a base, runs, a grid -> every run's validated config and folder
runner.py   starts what is not done yet, several at once, and survives being killed
table.py    results.csv and results.parquet: a row for each run and evaluated set
"""
