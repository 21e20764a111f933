"""Studies: many runs of `experiments/run.py` on one machine or many, until all are done.

`study` reads a study file, `state` tells from the runs' folders how far each is, `worker` brings
one run to its end, and `places` hands runs to this machine, to a Ray cluster, or to SLURM.
`launch/sweep.py` is the command.
"""
