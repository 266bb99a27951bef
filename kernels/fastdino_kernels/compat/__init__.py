"""Drop-ins with the names and signatures of other repositories; ../../README.md lists them.

lightly.py      DINOLoss: lightly.loss.DINOLoss
solo_learn.py   DINOLoss: solo.losses.DINOLoss
dinov2.py       cross_entropy: the xformers.ops.cross_entropy that DINOv2 and lightly-train import
                dino_clstoken_loss: the forward pass of DINOv2's DINOLoss
                dino_cross_entropy: the einsum form over all pairs of crops, as in DINOv3
stacking.py     stacking of a list of crops, without a copy if they are views of one tensor

Each module is written from the equations of its original; no code is copied. facebookresearch/dino
needs no module here: its DINOLoss is fastdino_kernels.DINOLoss.
"""
