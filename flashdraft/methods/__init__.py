"""One file per decoding method, network and drafter together. They import neither each other nor the engine."""
