"""Matrices with eigenvalues that are known."""

import numpy as np


def spread(size, decades, seed):
    """A symmetric positive matrix with eigenvalues over ``decades``, in a random basis."""
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]
    return (basis * np.logspace(0, -decades, size)) @ basis.T
