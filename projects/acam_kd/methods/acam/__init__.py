"""ACAM-KD: the method, its cross-attention fusion (STCA-FF) and its adaptive masks (ASCM)."""

from .fusion import CrossAttentionFusion, TeacherFusion
from .masking import ChannelMasking, SpatialMasking, UniformMasking
from .method import ACAMKD

__all__ = ["ACAMKD", "ChannelMasking", "CrossAttentionFusion", "SpatialMasking", "TeacherFusion", "UniformMasking"]
