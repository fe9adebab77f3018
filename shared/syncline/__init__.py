"""Syncline trains one PyTorch model on many machines that talk only over a NATS message bus."""

__version__ = "0.1.0"
