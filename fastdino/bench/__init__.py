"""`fastdino bench`: throughput of the training step and of the data loaders, against baselines.

flags.py               command-line flags
step_benchmark.py      the training step: correctness.py checks a baseline before it is timed,
                       step_profile.py and flops.py analyse it, step_report.py prints the results
loader_benchmark.py    the loaders; generated_photos.py makes images for them
scaling.py             model of the step on many GPUs, from the collectives of step_messages.py
baselines/             the implementations that are compared
harness.py             interleaved rounds; worker_process.py isolates a baseline in a process
measurement.py         time, memory, bandwidth; report.py: tables and files
"""
