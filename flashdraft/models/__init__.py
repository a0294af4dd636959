"""Targets and what runs them: the contract, transformers' own forward, our decoder and its C++ kernels."""
