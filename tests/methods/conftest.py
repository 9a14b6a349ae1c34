"""The fixtures of this folder's tests."""

from ..fixtures import official, sizes  # noqa: F401
