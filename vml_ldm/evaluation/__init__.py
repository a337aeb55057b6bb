"""Measuring restored images: masks to try (tasks), figures (metrics) and the comparison (demo)."""
