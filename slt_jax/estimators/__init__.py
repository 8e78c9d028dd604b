"""The calls: one estimate, a sweep over settings, a trajectory over training."""
