"""Drop-ins with the names and signatures of other repositories; ../../README.md lists them.

lightly.py      DINOLoss, IBOTPatchLoss, IBOTPlusPlusPatchLoss, KoLeoLoss, Center: those of lightly,
                in the files lightly_*.py
rank_mean.py    the mean of a batch over the ranks, toward which lightly's centers move
solo_learn.py   DINOLoss: solo.losses.DINOLoss
dinov2.py       DINOLoss, iBOTPatchLoss, KoLeoLoss: those of dinov2.loss
                cross_entropy: the xformers.ops.cross_entropy that DINOv2 and lightly-train import
dinov3.py       DINOLoss, iBOTPatchLoss, KoLeoLoss, KoLeoLossDistributed, GramLoss, by signature
ibot.py         iBOTLoss: that of iBOT's main_ibot.py
lightly_train.py  DINOv2's losses by lightly-train's names
stable_pretraining.py  DINOv1Loss, iBOTPatchLoss, DINOv2Loss, sinkhorn_knopp: those of
                stable_pretraining.losses
soft_targets.py the cross-entropies of these losses, as functions
teacher_center.py  the center of the teacher's logits and its delayed update
stacking.py     stacking of a list of crops, without a copy if they are views of one tensor

Each module is written from the equations of its original; no code is copied. facebookresearch/dino
needs no module here: its DINOLoss is fastdino_kernels.DINOLoss.
"""
