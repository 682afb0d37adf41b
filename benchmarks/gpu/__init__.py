"""The sections of `benchmarks/on_gpu.py`: what each measures, and how its results are kept."""
