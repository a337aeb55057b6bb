"""Stable Diffusion pipelines whose inverse problems are solved by VML-MAP. Each file is also a `custom_pipeline`."""
