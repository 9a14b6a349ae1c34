"""Mask R-CNN on a ViTDet-B backbone from the model zoo's Mask R-CNN R101-FPN, with Detectron2's own tool.

    cd detectron2 && python tools/lazyconfig_train_net.py --num-gpus 8 \
        --config-file .../configs/lazy/acam_vitdet_b_r101.py

The student's batches are padded to squares of 1024 pixels, which the teacher's FPN takes as they are. Layer-wise
learning rates go by parameter name, and the student's names are those of the plain ViTDet. The recipe is Detectron2's,
100 epochs. It has not been run on COCO.
"""

from functools import partial

from detectron2.config import LazyCall as L
from detectron2.model_zoo import get_config
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

import acam_kd
from acam_kd.d2 import load_teacher

model = L(acam_kd.distill)(
    student=get_config("common/models/mask_rcnn_vitdet.py").model,
    teacher=L(load_teacher)(model="COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x.yaml", device="${train.device}"),
    method="ACAMKD",
    alpha=1.0,
)

dataloader = get_config("common/data/coco.py").dataloader
dataloader.train.mapper.image_format = dataloader.test.mapper.image_format = "RGB"

train = get_config("common/train.py").train
train.amp.enabled = True
train.ddp.fp16_compression = True
train.max_iter = 184375
train.init_checkpoint = "detectron2://ImageNetPretrained/MAE/mae_pretrain_vit_base.pth?matching_heuristics=True"

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[1.0, 0.1, 0.01], milestones=[163889, 177546], num_updates=train.max_iter
    ),
    warmup_length=250 / train.max_iter,
    warmup_factor=0.001,
)
optimizer = get_config("common/optim.py").AdamW
optimizer.params.lr_factor_func = partial(get_vit_lr_decay_rate, num_layers=12, lr_decay_rate=0.7)
optimizer.params.overrides = {"pos_embed": {"weight_decay": 0.0}}
