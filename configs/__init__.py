"""Configurations of runs, which an installation has within itself."""
