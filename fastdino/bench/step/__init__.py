"""The benchmark of the training step: ours beside others, each checked before it is timed."""
