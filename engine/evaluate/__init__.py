"""Judging models: task metrics on held-out documents and the comparison of strategies over seeds."""
