"""Drop-ins under the names and signatures that other repositories use; ../../README.md has a table.

lightly.py      DINOLoss: lightly.loss.DINOLoss
solo_learn.py   DINOLoss: solo.losses.DINOLoss
dinov2.py       cross_entropy: the xformers.ops.cross_entropy that DINOv2 and lightly-train look for
                dino_clstoken_loss: the forward of DINOv2's DINOLoss
                dino_cross_entropy: the einsum form over all pairs of crops, as in DINOv3
crops.py        crops in a list as one tensor, without a copy where they are pieces of one

Each module is written from what its original computes; no code is taken over. facebookresearch's
dino needs no module here: its DINOLoss is fastdino_kernels.DINOLoss.
"""
