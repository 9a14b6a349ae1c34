"""FCOS R50 from the model zoo's RetinaNet R101, with Detectron2's own tool.

    cd detectron2 && python tools/lazyconfig_train_net.py --num-gpus 8 \
        --config-file .../configs/lazy/acam_fcos_r50_retinanet_r101.py

Detectron2 has FCOS as a LazyConfig only. Levels p3 to p7 have the same strides in both; nothing is inherited, since
the heads are of other kinds. The schedule is Detectron2's 1x. It has not been run on COCO.
"""

from detectron2.config import LazyCall as L
from detectron2.model_zoo import get_config

import acam_kd
from acam_kd.d2 import load_teacher

_fcos = get_config("COCO-Detection/fcos_R_50_FPN_1x.py")
dataloader, optimizer, lr_multiplier, train = _fcos.dataloader, _fcos.optimizer, _fcos.lr_multiplier, _fcos.train

model = L(acam_kd.distill)(
    student=_fcos.model,
    teacher=L(load_teacher)(model="COCO-Detection/retinanet_R_101_FPN_3x.yaml", device="${train.device}"),
    method="ACAMKD",
    alpha=1.0,
)
