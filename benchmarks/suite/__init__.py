"""Does the default help, and does it ever harm?

Many small tasks far from one another, and everybody's recipe on them.

`pictures.py` draws and reads the images, `tasks.py` encodes them, `peers.py`, `through_tower.py` and
`ours.py` are the methods, `run.py` runs and records, `table.py` and `plot.py` read what was recorded.
"""
