"""What is timed side by side: one file each, imported only when it takes part.

`attach(model, experts)` puts adapters on the FFN Linears of a model, `wrap(linear, experts)` on one Linear.
"""
