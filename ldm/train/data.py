"""The pictures and captions that the default model learns from."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

BACKGROUNDS = {
    "white": (255, 255, 255), "black": (20, 20, 20), "red": (220, 50, 47), "orange": (245, 150, 40),
    "yellow": (250, 220, 70), "green": (80, 170, 80), "blue": (60, 120, 216), "purple": (140, 80, 180),
    "pink": (245, 160, 190), "gray": (150, 150, 150), "brown": (130, 90, 60),
}  # fmt: skip


def load(file: Path) -> tuple[np.ndarray, list[dict]]:
    """Straight-alpha pictures (n,64,64,4) uint8 and n descriptions: label, tags, style, colors, hex, split."""
    data = np.load(file)
    return data["images"], json.loads(str(data["captions"]))


def composite(rgba: np.ndarray, background: tuple[int, int, int] | np.ndarray = (255, 255, 255)) -> np.ndarray:
    """(n,64,64,4) uint8 over one colour, or one each (n,1,1,3) -> (n,64,64,3) uint8."""
    alpha = rgba[..., 3:].astype(np.uint16)
    ground = np.array(background, dtype=np.uint16)
    return ((rgba[..., :3].astype(np.uint16) * alpha + ground * (255 - alpha) + 127) // 255).astype(np.uint8)


def to_tensor(rgb: np.ndarray | list[np.ndarray]) -> Tensor:
    """(n,h,w,3) uint8 -> (n,3,h,w) float32 in [-1,1], contiguous."""
    return (torch.from_numpy(np.asarray(rgb)).permute(0, 3, 1, 2).float() / 127.5 - 1).contiguous()
