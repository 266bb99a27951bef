"""Checks and measurements for GPUs.

compile_gates.py   compile every kernel ahead of time, without a GPU; sass.py reads the machine code
                   kernel_calls.py launches every kernel, recording_driver.py records the launches
gpu_report.py      correctness, benchmarks and GPU tests in one report; subprocesses.py runs them,
                   device_facts.py measures the device, compile_ahead.py fills Triton's cache
sanitize.py        launch each kernel once, for compute-sanitizer
tune.py            time the kernels' launch configurations
"""
