"""`fastdino bench`: how fast the parts of a run are on this machine, beside what people use.

command.py has the flags. step/ is the benchmark of the training step. loaders.py is that of the
loaders: arms.py makes what is compared, rivals.py those of others, stages.py times the parts of an
image's crops, photos.py makes images, report.py the tables. timing.py and isolated.py serve it:
rounds in turn, and a process for each competitor.
"""
