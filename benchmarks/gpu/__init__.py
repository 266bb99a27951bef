"""Checks and measurements for GPUs.

kernel_calls.py    calls that launch every kernel as training does
option_calls.py    calls with every option, dtype and layout
recording_driver.py   records launches instead of running them; emulated_gpu.py: a device for them
compile_gates.py   compile the kernels ahead of time; sass.py, amdgcn.py: counts of machine code
gpu_report.py      correctness, benchmarks and GPU tests in one report; subprocesses.py runs them,
                   device_facts.py measures the device, compile_ahead.py fills Triton's cache
sanitize.py        launch each kernel once, for compute-sanitizer
tune.py            time the kernels' launch configurations
"""
