"""Networks: backbones, the projection head, and loading of weights."""
