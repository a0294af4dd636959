"""Targets and what runs them.

The contract (target), transformers' own forward (hf), our decoder (lean, decoder) and its C++
kernels (native).
"""
