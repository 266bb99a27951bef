"""Checks and measurements for GPUs.

compile_gates.py   compile every kernel ahead of time, without a GPU; sass.py reads the machine code
                   kernel_calls.py launches every kernel, recording_driver.py records the launches
gpu_report.py      environment, GPU tests and benchmarks in one report; subprocesses.py runs them
sanitize.py        launch each kernel once, for compute-sanitizer
tune.py            time the kernels' launch configurations
"""
