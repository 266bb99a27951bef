"""What the kernels cost, beside what people use today: make bench, make gates, make gpu-report.

bench_*.py          pytest-benchmark suites, one a subject: loss, EMA, clip, overhead of a call
contest.py          variants of one operation: checked, timed in turn, replayed to pytest-benchmark
measure.py          time, peak memory and copy bandwidth, on a GPU and on a CPU
loss_variants.py    the paper's eager loss and the einsum form; shapes.py: a network's parameters
report.py           pytest-benchmark's JSON -> a Markdown table
compare_modes.py    a short training by --mode fast beside one by --mode parity
gpu/                compile gates, sanitizer, tuning, GPU report
"""
