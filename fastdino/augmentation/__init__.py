"""Multi-crop augmentation: sampled parameters and the backends that apply them."""
