"""Pretraining: the loop, the training step and what it is made of."""
