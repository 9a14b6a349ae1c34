"""A stand-in for the DETRs that are built on Detectron2: their contract in a few lines, not their accuracy.

A list of dicts goes in. In training a dict of losses comes out: those that ``criterion.weight_dict`` knows are weighted,
auxiliary ones of earlier decoder layers among them; the others only inform, and are left in the dict without a weight.
"""

from __future__ import annotations

import torch
from detectron2.modeling import META_ARCH_REGISTRY, build_backbone
from detectron2.structures import Boxes, ImageList, Instances
from torch import nn
from torch.nn import functional as F

DIM = 16


class MaskedBackbone(nn.Module):
    """Gives the images, without their padding, to Detectron2's backbone; it takes no tensor itself."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, images: ImageList):
        return self.backbone(images.tensor)


class Detr(nn.Module):
    """Backbone, encoder and decoder; tokens come first, as in torch's own transformer."""

    def __init__(self, backbone, classes, queries=5):
        super().__init__()
        channels = backbone.output_shape()["res5"].channels
        self.backbone = nn.Sequential(MaskedBackbone(backbone))
        self.project = nn.Conv2d(channels, DIM, 1)
        layer = {"d_model": DIM, "nhead": 2, "dim_feedforward": 16, "dropout": 0.0}
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**layer), 1, enable_nested_tensor=False)
        self.decoder = nn.ModuleList(nn.TransformerDecoderLayer(**layer) for _ in range(2))
        self.queries = nn.Embedding(queries, DIM)
        self.class_embed, self.bbox_embed = nn.Linear(DIM, classes + 1), nn.Linear(DIM, 4)

    def forward(self, images: ImageList):
        tokens = self.project(self.backbone(images)["res5"]).flatten(2).permute(2, 0, 1)
        memory = self.encoder(tokens)
        found = self.queries.weight[:, None].expand(-1, len(images), -1)
        outputs = []
        for layer in self.decoder:
            found = layer(found, memory)
            outputs.append((self.class_embed(found).transpose(0, 1), self.bbox_embed(found).sigmoid().transpose(0, 1)))
        return outputs


class Criterion:
    """The i-th query answers for the i-th object; the real ones match them first."""

    weight_dict = {"loss_ce": 1.0, "loss_bbox": 5.0, "loss_ce_0": 1.0, "loss_bbox_0": 5.0}

    def __call__(self, outputs, classes, boxes):
        losses = {}
        for suffix, (logits, found) in zip(("_0", ""), outputs):
            wanted = torch.full(logits.shape[:2], logits.shape[2] - 1)
            errors = []
            for i, (c, b) in enumerate(zip(classes, boxes)):
                wanted[i, : len(c)] = c
                errors.append((found[i, : len(b)] - b).abs().sum())
            losses[f"loss_ce{suffix}"] = F.cross_entropy(logits.transpose(1, 2), wanted)
            losses[f"loss_bbox{suffix}"] = torch.stack(errors).sum() / max(sum(map(len, boxes)), 1)
        right = (logits.detach().argmax(2) == wanted).float().mean()
        return {**losses, "class_error": 100 - 100 * right, "cardinality_error": torch.tensor(float(len(boxes)))}


@META_ARCH_REGISTRY.register()
class StandInDetr(nn.Module):
    """The meta-architecture, whose backbone is hidden in the network, as in DETR's own Detectron2 code."""

    def __init__(self, cfg):
        super().__init__()
        self.detr = Detr(build_backbone(cfg), cfg.MODEL.RETINANET.NUM_CLASSES)
        self.criterion = Criterion()
        self.input_format = cfg.INPUT.FORMAT
        for name, values in (("pixel_mean", cfg.MODEL.PIXEL_MEAN), ("pixel_std", cfg.MODEL.PIXEL_STD)):
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    def forward(self, batched_inputs):
        pictures = [(x["image"].float() - self.pixel_mean) / self.pixel_std for x in batched_inputs]
        images = ImageList.from_tensors(pictures, 32)
        outputs = self.detr(images)
        if not self.training:
            return [self._detections(x, *(o[i] for o in outputs[-1])) for i, x in enumerate(batched_inputs)]
        objects = [x["instances"] for x in batched_inputs]
        sides = [torch.tensor([*o.image_size[::-1]] * 2) for o in objects]
        boxes = [o.gt_boxes.tensor[:5] / side for o, side in zip(objects, sides)]
        losses = self.criterion(outputs, [o.gt_classes[:5] for o in objects], boxes)
        for name in losses:
            if name in self.criterion.weight_dict:
                losses[name] = losses[name] * self.criterion.weight_dict[name]
        return losses

    def _detections(self, x, logits, boxes):
        scores, classes = logits.softmax(1)[:, :-1].max(1)
        size = (x["height"], x["width"])
        boxes = Boxes(boxes * torch.tensor([*size[::-1]] * 2))
        return {"instances": Instances(size, scores=scores, pred_classes=classes, pred_boxes=boxes)}


@META_ARCH_REGISTRY.register()
class StandInDetrWithBackbone(StandInDetr):
    """The same with Detectron2's usual attribute, as later codebases have it."""

    @property
    def backbone(self):
        return self.detr.backbone[0].backbone
