"""One picture as training sees it: a Pillow image becomes an array, and what was lost or changed on the way is counted.

Why counted: a set of a million files has a few hundred odd ones, and nobody looks at each; a line that says "images
with transparency, put on white: 12" tells what to look for."""

import warnings
from functools import lru_cache
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms, ImageOps

from data import to_picture

warnings.filterwarnings("ignore", module="PIL")  # whatever matters is raised


@lru_cache(maxsize=64)
def transform_to_srgb(profile, mode):
    """How to convert images of `mode` from a colour profile (its bytes) to sRGB; None if they look the same there.
    Raises PyCMSError for a damaged profile, or one of other colours."""
    transform = ImageCms.buildTransform(ImageCms.ImageCmsProfile(BytesIO(profile)), ImageCms.createProfile("sRGB"),
                                        mode, "RGB")
    if mode == "CMYK":
        return transform
    steps = np.linspace(0, 255, 6).astype(np.uint8)
    samples = np.stack(np.meshgrid(*[steps] * len(mode)), -1).reshape(1, -1, len(mode))  # (1, N, 1 or 3)
    picture = Image.fromarray(samples[..., 0] if mode == "L" else samples)
    converted = np.asarray(ImageCms.applyTransform(picture, transform)).astype(int)
    return transform if abs(converted - samples).max() > 8 else None


def apply_profile(image, changes):
    """An image of mode L, RGB or CMYK as L or RGB in the colours of sRGB."""
    grey, transform = image.mode == "L", None
    profile = image.info.get("icc_profile")
    if profile:
        try:
            transform = transform_to_srgb(profile, image.mode)
        except (ImageCms.PyCMSError, OSError):
            changes["with a colour profile that does not fit them, left aside"] += 1
    if transform:
        changes["with a colour profile, converted to sRGB"] += 1
        image = ImageCms.applyTransform(image, transform)
    if image.mode == "CMYK":
        changes["of CMYK without a colour profile that fits, converted roughly"] += 1
        image = image.convert("RGB")
    return image.convert("L") if grey and transform else image


def from_deep_grey(image, changes):
    """A grey image of 16 bits as one of 8."""
    values = np.asarray(image).astype(np.int64)
    if values.min() < 0:
        raise ValueError("has values below 0; save it with values from 0 to 65535, or 0 to 255")
    if image.format == "TIFF" and image.tag_v2.get(262) == 0:  # where 0 is white
        values = 65535 - values
    if values.max() < 4096:
        changes["of 12 bits or fewer in 16, which become almost black; spread them over 16 bits first"] += 1
    grey = Image.fromarray(np.round(values / 257).astype(np.uint8))
    clear = image.info.get("transparency")
    if isinstance(clear, int):  # the value of transparent pixels
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    grey.info["icc_profile"] = image.info.get("icc_profile")
    return grey


def central_square(picture, size, changes):
    """The central square of a Pillow image of mode L or RGB as (1 or 3, S, S), resized to `size` if that is given."""
    W, H = picture.size
    side = min(W, H)
    if W != H:
        changes["not square, cropped to their centre"] += 1
        left, top = (W - side) // 2, (H - side) // 2
        picture = picture.crop((left, top, left + side, top + side))
    if size:
        changes["smaller than asked for, enlarged"] += side < size
        picture = picture.resize((size, size), Image.Resampling.LANCZOS)
    return np.atleast_3d(picture).transpose(2, 0, 1)


def from_picture(image, changes, size=None):
    """The central square of a Pillow image as uint8 (1 or 3, S, S), resized to `size` if that is given. changes: counts
    what is changed; what cannot be had raises ValueError."""
    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # MPO: a phone's photo with a second
        changes["of several pages or frames, of which the first is taken"] += 1
    deep = any(";16" in str(tile[3]) for tile in image.tile) or (image.format == "PPM" and image.mode == "I")
    image.load()
    if image.info or image.format in ("TIFF", "MPO"):  # where an orientation would be
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode in ("I", "F") and not deep:
        kind = "whole numbers" if image.mode == "I" else "real numbers"
        raise ValueError(f"has {kind} of 32 bits; save it with 8 or 16 bits a channel")
    if deep:
        changes["of 16 bits a channel, reduced to 8"] += 1
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = from_deep_grey(image, changes)
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("L" if Image.getmodebase(image.mode) == "L" else "RGB")
    image = apply_profile(image, changes)
    if alpha and alpha.getextrema()[0] < 255:
        changes["with transparency, put on white"] += 1
        clear = image.convert("RGB")
        clear.putalpha(alpha)
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, clear).convert(image.mode)
    return central_square(image, size, changes)


def crop_and_resize(image, size, channels, changes):
    """The central square of an image (C, H, W), resized to `size` if that is given, in grey or in colour."""
    C, H, W = image.shape
    if image.dtype != np.uint8 or (H == W and size in (None, H) and C == channels):
        return image
    changes["grey, made colour as others are"] += C < channels
    picture = to_picture(image).convert("L" if channels == 1 else "RGB")
    return central_square(picture, size, changes)
