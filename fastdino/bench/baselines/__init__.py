"""The implementations that `fastdino bench` compares: training steps and data loaders."""
