"""Studies: many runs of `experiments/run.py` on one machine or on many, until all are done.

`study` reads a study file, `status` reads the progress of the runs from their folders, `job` brings
one run to its end, and `backends` executes runs on this machine, on a Ray cluster, or with SLURM.
`dynajax sweep` is the command.
"""
