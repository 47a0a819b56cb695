"""The parts of benchmarks/gpu_first.py, which imports each only when it runs: what one of them lacks stops no other."""
