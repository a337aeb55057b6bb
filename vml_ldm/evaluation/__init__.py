"""Measuring restored images: masks and problems to try, figures (metrics), and comparisons (demo, benchmark)."""
