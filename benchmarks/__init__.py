"""Benchmarks of the kernels, and comparisons that only this repository needs.

bench_*.py             pytest-benchmark suites: loss, EMA, clip, optimizer, host overhead of a call
comparison.py          baselines of one operation: checked, then timed in interleaved rounds
networks.py            parameters in the shapes of a network
kernel_tables.py       pytest-benchmark's JSON -> Markdown tables
results_table.py       predictions next to measurements; the measured rows of the README
compare_modes.py       short trainings by --mode fast and --mode parity
crop_differences.py    differences of the crop backends, for docs/crops.md
step_collectives.py    collectives and bytes of a step, counted on several ranks
rank_faults.py         faults of a rank; kill_campaign.py, killed_runs.py: runs that are killed
liveness_cost.py       time of the signs of life between ranks
save_times.py          time that a save stops the training
gpu/                   compile gates, sanitizer, tuning, GPU report
results/               measured figures
"""
