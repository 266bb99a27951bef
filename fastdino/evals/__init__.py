"""Evaluation commands of the paper, one file per command, and the code that they share."""
