"""gidef: federated training of medical-image models, gradient inversion of what clients share, and defences against it."""

__version__ = "0.1.0"
