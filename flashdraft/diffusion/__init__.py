"""Block speculation for image diffusion models."""
