"""Mask R-CNN R50 from Detectron2's Cascade Mask R-CNN Swin-B, with Detectron2's own tool.

    cd detectron2 && python tools/lazyconfig_train_net.py --num-gpus 8 --config-file .../configs/lazy/acam_r50_swin_b.py

The teacher is that of Detectron2's projects/ViTDet, whose file of weights (model_final_246a82.pkl, COCO box AP 53.9
there) it takes whole. It gets the student's batches, which are padded to multiples of 32, and not to squares. Another
teacher: a Swin of other ``depths`` and ``embed_dim``, or ViTDet, ``get_config("common/models/mask_rcnn_vitdet.py")``.
The schedule is Detectron2's 1x. It has not been run on COCO.
"""

from detectron2.config import LazyCall as L
from detectron2.model_zoo import get_config
from detectron2.modeling import SwinTransformer

import acam_kd
from acam_kd.d2 import load_teacher

_teacher = get_config("common/models/cascade_rcnn.py").model
_constants = get_config("common/data/constants.py").constants
_teacher.pixel_mean, _teacher.pixel_std = _constants.imagenet_rgb256_mean, _constants.imagenet_rgb256_std
_teacher.input_format = "RGB"
_teacher.backbone.bottom_up = L(SwinTransformer)(
    embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32], drop_path_rate=0.4
)
_teacher.backbone.in_features = ("p0", "p1", "p2", "p3")
_teacher.backbone.norm = _teacher.roi_heads.mask_head.conv_norm = "LN"
_teacher.proposal_generator.head.conv_dims = [-1, -1]
for _head in _teacher.roi_heads.box_heads:
    _head.conv_dims, _head.fc_dims, _head.conv_norm = [256] * 4, [1024], "LN"

model = L(acam_kd.distill)(
    student=get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py").model,
    teacher=L(load_teacher)(model=_teacher, weights="model_final_246a82.pkl", device="${train.device}"),
    method="ACAMKD",
    alpha=1.0,
)

_base = get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py")
dataloader, optimizer, lr_multiplier, train = _base.dataloader, _base.optimizer, _base.lr_multiplier, _base.train
