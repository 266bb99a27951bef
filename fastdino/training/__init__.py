"""Pretraining: the loop, the training step and its parts."""
