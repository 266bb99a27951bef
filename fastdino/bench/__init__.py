"""`fastdino bench`: how fast the parts of a run are on this machine, beside what people use.

command.py has the flags. loaders.py is the benchmark of loaders: arms.py makes what is compared,
rivals.py those of others, stages.py times the parts of an image's crops, photos.py makes images,
report.py the tables. timing.py and isolated.py serve every benchmark: rounds in turn, and a process
for each competitor.
"""
