"""What is timed side by side: one file each, imported only when it takes part.

`attach(model, experts)` puts adapters on the FFN Linears of a model, `wrap(linear, experts)` on one Linear,
`expand(block, experts)` turns one FFN into experts. `factors(module, read)` are the trained tensors that contestants
share, by common names (benchmarks/agreement.py).
"""
