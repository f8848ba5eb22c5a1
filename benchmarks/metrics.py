"""MS-SSIM of 8-bit RGB as the package pytorch-msssim has it; PSNR is ``vaecodec.metrics``'."""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SIDE_MIN = 161
"""Pixels along the shorter side that MS-SSIM needs: its window of 11 still has to fit after four halvings."""


def ms_ssim(original: Image.Image, decoded: Image.Image) -> float:
    """MS-SSIM of two RGB pictures, data range 255, the mean of the three channels (package pytorch-msssim).

    Raises AssertionError for a picture with a side under ``SIDE_MIN``.
    """
    from pytorch_msssim import ms_ssim as computed  # of the "bench" extra; PSNR does without

    with torch.no_grad():
        return float(computed(planes(original), planes(decoded), data_range=255.0))


def decibels(ms_ssim: float) -> float:
    """MS-SSIM as -10 log10(1 - x), the scale on which its curves are drawn and compared."""
    return -10 * math.log10(1 - ms_ssim)


def planes(picture: Image.Image) -> Tensor:
    """float32 [1, 3, H, W] in 0 to 255."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float()
