"""The networks: backbones, the projection head, the wrapper for crops of several sizes."""
